"""What is remembered of a learner survives two writers, a broken file and a folder that can't be written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_teach.course import state


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    monkeypatch.setenv("PEFT_TEACH_HOME", str(folder))
    monkeypatch.setattr(state, "_unwritable", {})
    return folder


def python(code, **env):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | env)


def test_what_is_written_is_read(home):
    assert state.read("book.it") == {} and not home.exists()
    state.write("book.it", score=1.5, last_cause=["α"])
    assert state.write("book.it", score=2, name="it") == {"score": 2, "last_cause": ["α"], "name": "it"}
    assert state.read("book.it") == json.loads((home / "book.it.json").read_text("utf-8")) == {"score": 2, "last_cause": ["α"], "name": "it"}
    assert state.read("book.other") == {}


def test_two_processes_at_once_leave_every_file_whole(home):
    code = """
import sys
from peft_teach.course import state
for n in range(50):
    state.write("shared", **{sys.argv[1]: "x" * 20_000, "n": n})
    state.write("own." + sys.argv[1], n=n)
    assert "n" in state.read("shared")
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, who]) for who in ("a", "b")]
    seen = 0
    while any(w.poll() is None for w in writers):
        seen += "n" in state.read("shared")
    assert [w.returncode for w in writers] == [0, 0] and seen > 0
    assert sorted(p.name for p in home.iterdir()) == ["own.a.json", "own.b.json", "shared.json"]  # none broken, no part left
    assert state.read("own.a") == state.read("own.b") == {"n": 49}
    assert state.read("shared")["n"] == 49


@pytest.mark.parametrize("text", [b'{"score": 1', b"", b"\xff\xfe", b"[1]", b"null"])
def test_a_broken_file_is_put_aside_and_work_goes_on(home, text):
    home.mkdir()
    (home / "book.it.json").write_bytes(text)
    assert state.read("book.it") == {}
    assert (home / "book.it.broken").read_bytes() == text
    state.write("book.it", score=3)
    assert state.read("book.it") == {"score": 3}


def test_a_file_in_the_way_of_the_folder_keeps_progress_for_this_session(home, capsys):
    home.write_text("not a folder")
    state.write("book.it", attempts=1)
    assert state.write("book.it", score=2) == {"attempts": 1, "score": 2}
    state.write("book.other", score=1)
    assert state.read("book.it") == {"attempts": 1, "score": 2}
    told = capsys.readouterr().err
    assert told.count("PEFT_TEACH_HOME") == 1 and "this session only" in told  # once is enough
    assert home.read_text() == "not a folder"


def test_a_folder_that_turns_unwritable_keeps_what_came_after(home, monkeypatch, capsys):
    state.write("book.it", attempts=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(json, "dump", full)
        state.write("book.it", attempts=2)
        assert state.read("book.it") == {"attempts": 2}
    assert [p.name for p in home.iterdir()] == ["book.it.json"]  # no part left over
    state.write("book.it", score=1)  # there is room again
    assert json.loads((home / "book.it.json").read_text()) == state.read("book.it") == {"attempts": 2, "score": 1}
    assert "No space left" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write into every folder")
def test_a_read_only_folder(home, capsys):
    home.mkdir(mode=0o500)
    state.write("book.it", score=2)
    assert state.read("book.it") == {"score": 2} and list(home.iterdir()) == []
    assert "this session only" in capsys.readouterr().err


def test_the_builder_has_a_fresh_folder_each_time_and_leaves_none():
    code = "from peft_teach.course import state; state.write('book.it', score=1); print(state.home(), state.read('book.other'))"
    homes = []
    for _ in range(2):
        out = python(code, PEFT_TEACH_BUILD="1", PEFT_TEACH_HOME="").communicate()[0]
        folder, read = out.split()
        assert read == "{}" and not Path(folder).exists()
        homes.append(folder)
    assert homes[0] != homes[1]


def test_a_learner_has_a_folder_beside_the_notebook(tmp_path, monkeypatch):
    monkeypatch.delenv("PEFT_TEACH_HOME", raising=False)
    monkeypatch.setenv("PEFT_TEACH_BUILD", "0")
    monkeypatch.chdir(tmp_path)
    state.write("book.it", score=1)
    assert (tmp_path / ".peft_teach" / "book.it.json").exists()
