"""`peft-teach …`: the one command line. Exit: 0 all well, 1 something was not, 2 wrong use."""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="peft-teach", description="Learn parameter-efficient fine-tuning by building it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    lab = commands.add_parser("lab", help="copy the chapters into work/ and open JupyterLab there")
    lab.add_argument("--no-open", action="store_true", help="copy, and open nothing")
    check = commands.add_parser("check", help="check all answers in a notebook or a .py file")
    check.add_argument("notebook", type=Path)
    check.add_argument("--json", action="store_true", help="verdicts as JSON")
    build = commands.add_parser("build", help="make the notebooks from solutions/NN_name.py")
    build.add_argument("chapter", nargs="?", metavar="NN", help="one chapter, by number")
    build.add_argument("--check", action="store_true", help="say what is stale; execute nothing")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "lab":
        parser.error(f"unknown: {' '.join(rest)}")
    options.rest = [word for word in rest if word != "--"]  # JupyterLab's own options
    try:
        return {"lab": _lab, "check": _check, "build": _build}[options.command](options)
    except (FileNotFoundError, LookupError) as error:
        print(f"peft-teach: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _lab(options: argparse.Namespace) -> int:
    from peft_teach.course.notebooks import find_root

    root = find_root()
    for line in copy_chapters(root / "chapters", root / "work"):
        print(line)
    if options.no_open:
        return 0
    return subprocess.call([sys.executable, "-m", "jupyter", "lab", f"--notebook-dir={root / 'work'}", *options.rest])


def copy_chapters(chapters: Path, work: Path) -> list[str]:
    """Copy what is new; never overwrite. → a line for each file that came.

    The chapter as it was handed out is kept in work/.handed_out, to tell a newer chapter from a
    learner's own changes.
    """
    from peft_teach import __version__

    said, before = [], work / ".handed_out"
    before.mkdir(parents=True, exist_ok=True)
    for chapter in sorted(chapters.glob("*.ipynb")):
        mine, handed_out, text = work / chapter.name, before / chapter.name, chapter.read_bytes()
        target = mine
        if mine.exists():
            if handed_out.exists() and handed_out.read_bytes() == text or mine.read_bytes() == text:
                continue
            target = next(t for n in range(1, 1000)
                          if not (t := work / f"{chapter.stem}.{__version__}{f'-{n}' if n > 1 else ''}.ipynb").exists())
            said.append(f"{chapter.name} has a newer version. Yours stays as it is; the new one is work/{target.name}")
        else:
            said.append(f"work/{target.name}")
        for path in (target, handed_out):
            part = path.with_name(path.name + ".part")
            part.write_bytes(text)
            os.replace(part, path)
    return said


def _build(options: argparse.Namespace) -> int:
    from nbclient.exceptions import CellExecutionError

    from peft_teach.course.notebooks import BuildError, build, chapters, check_built, find_root

    status = 0
    for chapter in chapters(find_root(), options.chapter):
        try:
            if options.check:
                found = check_built(chapter)
                print("\n".join(found) or f"{chapter.source.stem}: current")
                status |= bool(found)
            else:
                print(f"{chapter.source.stem} …", flush=True)
                changed = build(chapter)
                print("  " + (", ".join(f"{p.parent.name}/{p.name}" for p in changed) or "unchanged"))
        except BuildError as error:
            print(error, file=sys.stderr)
            status = 1
        except CellExecutionError as error:
            print(f"{chapter.source.name}: a cell failed, nothing was written to solutions/\n{str(error)[-3000:]}", file=sys.stderr)
            status = 1
    return status


def _check(options: argparse.Namespace) -> int:
    if not options.notebook.is_file():
        print(f"peft-teach: there is no file {options.notebook}", file=sys.stderr)
        return 2
    try:
        cells = code_cells(options.notebook)
        wanted = asked_for(cells)
    except ValueError as error:
        print(f"peft-teach: {options.notebook}: {error}", file=sys.stderr)
        return 2
    if not wanted:
        print(f'peft-teach: no check("…", …) in {options.notebook}', file=sys.stderr)
        return 2
    verdicts = []
    for key, name in wanted:
        verdicts.append(verdict_on(cells, key, name))
        if not options.json:
            print(verdicts[-1], flush=True)
    if options.json:
        print(json.dumps([v.as_dict() for v in verdicts], indent=1, ensure_ascii=False))
    else:
        passed = sum(v.passed for v in verdicts)
        score, most = sum(v.score for v in verdicts), sum(v.max_score for v in verdicts)
        print(f"\n{passed} of {len(verdicts)} exercises passed, {score:g} of {most:g} points")
    return 0 if all(v.passed for v in verdicts) else 1


def code_cells(path: Path) -> list[str]:
    """The code of a notebook, cell by cell; a .py file is one cell. ValueError for what is neither."""
    if path.suffix == ".py":
        return [path.read_text("utf-8")]
    try:
        notebook = json.loads(path.read_text("utf-8"))
        return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a notebook ({error})") from None


def asked_for(cells: list[str]) -> list[tuple[str, str]]:
    """(key, name of the answer) of each `check("key", name)` in the cells, the last one for a key."""
    from peft_teach.course.use import statements

    found: dict[str, str] = {}
    for statement in statements(cells):
        for node in ast.walk(statement.node):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "check":
                if len(node.args) == 2 and isinstance(node.args[0], ast.Constant) and isinstance(node.args[1], ast.Name):
                    found[node.args[0].value] = node.args[1].id
    return list(found.items())


def verdict_on(cells: list[str], key: str, name: str):
    """The verdict on one answer, run in a process of its own."""
    from peft_teach.course.checking import Verdict, judge
    from peft_teach.course.child import child_subject
    from peft_teach.course.exercise import find
    from peft_teach.course.subject import SubjectError
    from peft_teach.course.use import extract

    exercise = find(key)
    source = extract(cells, name, key)
    if source is None:
        return Verdict(key, "not attempted", 0.0, exercise.points, f"{name} is not defined", lines=[f"{name} is not defined."])
    try:
        with child_subject(source, name, key) as subject:
            return judge(exercise, subject)
    except SubjectError as error:
        line = f"your code could not be run: {error}" + (f"\n{error.where}" if error.where else "")
        return Verdict(key, "error", 0.0, exercise.points, line, lines=[line], all_probes=len(exercise.probes))


if __name__ == "__main__":
    sys.exit(main())
