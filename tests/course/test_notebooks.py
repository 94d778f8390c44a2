"""The chapters as files: nothing stale, nothing vacuous, blank ones fail every check, figures can be read."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from peft_teach import cli
from peft_teach.course import exercises
from peft_teach.course.notebooks import BuildError, Chapter, build, chapters, check_built, execute, find_root, make, sanitize

ROOT = find_root(Path(__file__).parent)
CHAPTERS = chapters(ROOT)
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.source.stem)


def code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


@every_chapter
def test_nothing_is_stale_and_every_cell_was_executed(chapter):
    assert check_built(chapter) == []


@every_chapter
def test_two_builds_have_the_same_bytes(chapter):
    assert nbformat.writes(make(chapter, True)) == nbformat.writes(make(chapter, True))


@every_chapter
def test_ids_hang_on_no_position(chapter, tmp_path):
    moved = tmp_path / "solutions" / chapter.source.name
    moved.parent.mkdir()
    moved.write_text("# %% [markdown]\n# A new cell above.\n\n" + chapter.source.read_text("utf-8"), "utf-8")
    ids = [c.id for c in make(Chapter(moved), False).cells]
    assert ids[1:] == [c.id for c in make(chapter, False).cells] and len(set(ids)) == len(ids)


@every_chapter
def test_every_check_passes_in_the_solved_notebook(chapter):
    solved = nbformat.read(chapter.solved, as_version=4)
    told = [c.outputs[0]["data"]["text/plain"] for c in code(solved) if c.metadata.get("peft_teach", {}).get("role") == "check"]
    assert told and all(t.startswith("✓") for t in told)
    assert {t.split()[1].rstrip(":") for t in told} == {e.key for e in exercises() if f"_{e.chapter}" in chapter.source.stem}


@every_chapter
def test_the_blank_one_runs_to_its_end_and_passes_nothing(chapter, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_TEACH_BUDGET", "tiny")
    blank = execute(make(chapter, True), tmp_path)
    told = [c.outputs[0]["data"]["text/plain"] for c in code(blank) if c.metadata.get("peft_teach", {}).get("role") == "check"]
    assert told and all("not attempted" in t for t in told)
    assert not any(o.output_type == "error" for c in code(blank) for o in c.outputs)


@every_chapter
def test_outputs_are_compared_for_real(chapter):
    solved = nbformat.read(chapter.solved, as_version=4)
    ignored = [c for c in solved.cells if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert all("nbval" in c.source for c in ignored), "the reason stands in the cell"
    assert len(ignored) <= 1
    printed = "".join(o.get("text", "") for c in code(solved) if c not in ignored for o in c.outputs)
    assert len(re.findall(r"\d+\.\d+", re.sub(r"≈ \S+", "", printed))) >= 10  # plain numbers, not only measured ones
    assert not re.search(r"0x[0-9a-f]{6,}|/tmp/|/home/|Warning", printed), "addresses, paths and warnings differ between machines"


@every_chapter
def test_figures_have_alt_text_and_a_fact(chapter):
    solved = nbformat.read(chapter.solved, as_version=4)
    figures = [(c, o) for c in code(solved) for o in c.outputs if "image/png" in o.get("data", {})]
    assert figures
    for cell, output in figures:
        assert len(output["metadata"]["image/png"]["alt"]) > 40
        assert any(o.output_type == "stream" for o in cell.outputs)


@every_chapter
def test_headings_nest(chapter):
    level = 0
    for cell in make(chapter, True).cells:
        if cell.cell_type == "markdown":
            for found in re.finditer(r"^(#+) ", cell.source, re.M):
                assert len(found[1]) <= level + 1, found[0]
                level = len(found[1])


@every_chapter
def test_no_answer_stands_in_the_blank(chapter):
    blank = make(chapter, True)
    answers = [c.source for c in blank.cells if c.metadata.get("peft_teach", {}).get("role") == "answer"]
    assert answers and all("NotImplementedError" in a or "..." in a for a in answers)


def test_sanitizing_blanks_measured_numbers_and_nothing_else():
    stream = lambda text: [{"output_type": "stream", "text": text}]  # noqa: E731
    assert sanitize(stream("loss ≈ 3.21 nats, 7 rows")) == sanitize(stream("loss ≈ 3.48 nats, 7 rows"))
    assert sanitize(stream("loss ≈ 3.21 nats, 7 rows")) != sanitize(stream("loss ≈ 3.21 nats, 8 rows"))
    lines = (ROOT / "solutions" / "sanitize.cfg").read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("regex")] == [r"regex: ≈ \S+"]


def test_one_altered_digit_fails_nbval(tmp_path):
    """The cells of chapter 03 that need no model, with one digit of one output changed."""
    solved = nbformat.read(ROOT / "solutions" / "03_lora_layer.ipynb", as_version=4)
    solved.cells = [c for c in solved.cells if c.id == code(solved)[0].id or "rank" in c.source and "numbers instead of" in c.source]
    status = []
    for name, digit in (("right.ipynb", "6"), ("altered.ipynb", "7")):
        output = solved.cells[-1].outputs[0]
        output["text"] = re.sub(r"from \d numbers", f"from {digit} numbers", output["text"])
        nbformat.write(solved, tmp_path / name)
        run = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider", "-o", "addopts=", name]
        status.append(subprocess.run(run, cwd=tmp_path, capture_output=True, text=True).returncode)
    assert status == [0, 1]


def test_a_rebuild_with_equal_outputs_keeps_the_file(tmp_path):
    source = tmp_path / "solutions" / "98_small.py"
    source.parent.mkdir()
    source.write_text('# %%\nfrom peft_teach.course import measured\nimport random\nmeasured("dice", 1 + random.random(), 1, 1)\n', "utf-8")
    chapter = Chapter(source)
    assert {p.parent.name for p in build(chapter)} == {"solutions", "chapters"}
    before = chapter.solved.read_bytes()
    assert build(chapter) == [] and chapter.solved.read_bytes() == before
    assert check_built(chapter) == []
    source.write_text(source.read_text("utf-8").replace("dice", "die"), "utf-8")
    assert len(check_built(chapter)) == 2


@pytest.mark.parametrize(("cell", "told"), [
    ("# %% key=\"lora_layer.nothing\" role=\"answer\"\nnothing = 1\n", "no exercise"),
    ("# %% role=\"anser\"\n1\n", "anser"),
    ("# %%\n# source: peft_teach.lora.layer: no_such_thing\n", "no_such_thing"),
    ("# %% key=\"lora_layer.delta_weight\" role=\"answer\"\nother = 1\n", "no top-level definition of delta_weight"),
])
def test_a_source_that_can_not_be_built_says_why(cell, told, tmp_path):
    (tmp_path / "99_bad.py").write_text(cell, "utf-8")
    with pytest.raises(BuildError, match=told):
        make(Chapter(tmp_path / "99_bad.py"), False)


# ---------------------------------------------------------------- claims and questions


def test_each_claim_has_a_cell_and_a_verdict():
    from peft_teach.course.reading import VERDICTS

    claims = yaml.safe_load((ROOT / "peft_teach/course/claims.yml").read_text("utf-8"))
    names = {c.source.stem: {cell.metadata.get("name") for cell in make(c, False).cells} for c in CHAPTERS}
    for key, claim in claims.items():
        assert claim["verdict"] in VERDICTS and claim["answer"], key
        assert claim["cell"] in names[claim["chapter"]], key
        assert ("condition" in claim) == (claim["verdict"] == "only if"), key
    assert {"C15", "C16", "C17"} <= set(claims)


def test_each_wrong_choice_is_explained():
    from peft_teach.course import quiz

    questions = yaml.safe_load((ROOT / "peft_teach/course/quizzes.yml").read_text("utf-8"))
    for key, question in questions.items():
        for letter in question["choices"]:
            assert str(quiz(key, letter)).startswith("✓" if letter == question["right"] else "✗")
            assert len(question["choices"][letter]["why"]) > 30
    with pytest.raises(ValueError, match="a, b, c"):
        quiz("lora_layer.1", "z")


def test_the_gallery_holds_at_least_eight():
    from peft_teach.course import gallery

    card = gallery("lora_layer.add_update", "lora_layer.LoRALinear")
    assert len(card.folded) >= 8 and all("just measured" in text for _, text in card.folded)


# ---------------------------------------------------------------- the command line


def test_check_on_the_solved_and_on_the_blank_notebook(capsys):
    assert cli.main(["check", str(ROOT / "solutions" / "03_lora_layer.ipynb"), "--json"]) == 0
    solved = json.loads(capsys.readouterr().out)
    assert len(solved) == 9 and all(v["status"] == "correct" for v in solved)
    assert cli.main(["check", str(ROOT / "chapters" / "03_lora_layer.ipynb")]) == 1
    told = capsys.readouterr().out
    assert told.count("not attempted") == 9 and "0 of 9 exercises passed" in told


@pytest.mark.parametrize(("text", "told"), [("not json", "not a notebook"), ('{"cells": []}', "no check"), (None, "no file")])
def test_check_on_what_is_no_notebook(text, told, tmp_path, capsys):
    path = tmp_path / "some.ipynb"
    if text is not None:
        path.write_text(text)
    assert cli.main(["check", str(path)]) == 2
    assert told in capsys.readouterr().err


def test_check_survives_code_that_ends_its_process(tmp_path, capsys):
    path = tmp_path / "some.py"
    path.write_text('import os\ndef delta_weight(A, B, lora_alpha, r, use_rslora=False):\n    os._exit(3)\ncheck("lora_layer.delta_weight", delta_weight)\n')
    assert cli.main(["check", str(path)]) == 1
    assert "process ended" in capsys.readouterr().out


def test_wrong_use_exits_with_2():
    for arguments in (["nothing"], [], ["build", "77"]):
        try:
            status = cli.main(arguments)
        except SystemExit as stopped:
            status = stopped.code
        assert status == 2


def test_lab_never_overwrites(tmp_path):
    chapters_, work = tmp_path / "chapters", tmp_path / "work"
    chapters_.mkdir()
    (chapters_ / "03_x.ipynb").write_text("first")
    assert cli.copy_chapters(chapters_, work) == ["work/03_x.ipynb"]
    assert cli.copy_chapters(chapters_, work) == []
    (work / "03_x.ipynb").write_text("my own work")
    assert cli.copy_chapters(chapters_, work) == []
    (chapters_ / "03_x.ipynb").write_text("second")
    (said,) = cli.copy_chapters(chapters_, work)
    assert "Yours stays" in said and (work / "03_x.ipynb").read_text() == "my own work"
    assert sorted(p.name for p in work.glob("*.ipynb"))[0].startswith("03_x.20") and cli.copy_chapters(chapters_, work) == []
