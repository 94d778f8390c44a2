"""From a chapter's source to its two notebooks: the learner's, blank, and the solved one, executed.

    solutions/NN_name.py ──┬──▶ solutions/NN_name.ipynb   answers filled in, executed
                           └──▶ chapters/NN_name.ipynb    answers blanked, no outputs

A cell of the source may carry `key="chapter.answer"` and `role="answer|check|given|figure|optional"`.
A line `# source: package.module: name other_name` in a cell is replaced by those definitions, and
`{{chapter.answer}}` in a text by the exercise's line: difficulty, importance, minutes, points.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from peft_teach.course.blank import blank, definition
from peft_teach.course.exercise import find

ROLES = ("answer", "check", "given", "figure", "optional")
EXERCISE_LINE = re.compile(r"\{\{([\w.]+)\}\}")
PREDICTION = re.compile(r'^(predict\("[\w.]+", ).*\)$', re.M)
SOURCE_LINE = re.compile(r"^# source: ([\w.]+): ([\w ]+)$", re.M)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
}


class BuildError(Exception):
    """A chapter's source is not what the builder can use; says which cell, and why."""


@dataclass(frozen=True)
class Chapter:
    source: Path

    @property
    def solved(self) -> Path:
        return self.source.with_suffix(".ipynb")

    @property
    def blank(self) -> Path:
        return self.source.parent.parent / "chapters" / self.solved.name


def find_root(start: Path | None = None) -> Path:
    """The repository's folder, from anywhere in it, or the one that this package lies in; FileNotFoundError else."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "solutions").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError("this needs the repository: no folder above has solutions/ and pyproject.toml")


def chapters(root: Path, number: str | None = None) -> list[Chapter]:
    """The chapters, or the one with this number; LookupError when there is none."""
    there = [Chapter(p) for p in sorted((root / "solutions").glob("[0-9A]*_*.py"))]
    if number is None:
        return there
    wanted = [c for c in there if c.source.name.split("_")[0].lstrip("0") == number.lstrip("0")]
    if not wanted:
        raise LookupError(f"no chapter {number}. There is: {', '.join(c.source.stem for c in there)}")
    return wanted


def make(chapter: Chapter, blanked: bool):
    """The notebook, not executed."""
    import jupytext
    import nbformat

    notebook = nbformat.v4.new_notebook(metadata=METADATA)
    seen: Counter[str] = Counter()
    for number, cell in enumerate(jupytext.read(chapter.source, fmt="py:percent").cells):
        where = f"{chapter.source.name}, cell {number} ({cell.source[:40]!r})"
        key, role = cell.metadata.get("key"), cell.metadata.get("role")
        if role is not None and role not in ROLES:
            raise BuildError(f"{where}: role {role!r} is none of {', '.join(ROLES)}")
        try:
            if cell.cell_type == "markdown":
                text = EXERCISE_LINE.sub(lambda found: exercise_line(found[1]), cell.source)
            else:
                text = _answer_cell(cell.source, key, blanked) if role == "answer" else _expand(cell.source)
                text = PREDICTION.sub(r"\1...)", text) if blanked else text
        except (LookupError, ImportError, AttributeError, KeyError) as error:
            raise BuildError(f"{where}: {error}") from None
        stem = key.replace(".", "-") if key else hashlib.sha256(cell.source.encode()).hexdigest()[:12]
        seen[stem] += 1
        identity = stem if seen[stem] == 1 else f"{stem}-{seen[stem]}"
        metadata = {k: v for k, v in cell.metadata.items() if k not in ("key", "role", "lines_to_next_cell")}
        if key or role:
            metadata["peft_teach"] = {k: v for k, v in (("key", key), ("role", role)) if v}
        new = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        notebook.cells.append(new(text, id=identity, metadata=metadata))
    return notebook


def exercise_line(key: str) -> str:
    """What stands under an exercise's heading."""
    e = find(key)
    points = f"{e.points} point{'s' if e.points > 1 else ''}"
    return f"difficulty {e.difficulty}/5 · importance {e.importance}/5 · {e.minutes[0]}–{e.minutes[1]} min · {points}"


def _expand(text: str) -> str:
    """Put the definitions where a `# source:` line asks for them."""

    def definitions(found: re.Match) -> str:
        source = inspect.getsource(importlib.import_module(found[1]))
        return "\n\n".join(definition(source, name).rstrip("\n") for name in found[2].split())

    return SOURCE_LINE.sub(definitions, text)


def _answer_cell(text: str, key: str, blanked: bool) -> str:
    exercise = find(key)
    answer = _expand(text)
    definition(answer, exercise.name)  # LookupError when the cell doesn't define it
    return (blank(answer, key) if blanked else answer).rstrip("\n")


def execute(notebook, folder: Path):
    """Run all cells as CI does: fresh state, no progress bars. CellExecutionError when one fails."""
    from nbclient import NotebookClient

    os.environ |= {"PEFT_TEACH_BUILD": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(folder)}})
    client.execute()
    notebook.metadata = METADATA
    return notebook


def sanitize(value):
    """Outputs without what may differ from machine to machine: pictures, and numbers behind ≈."""
    if isinstance(value, list):
        return [sanitize(v) for v in value]
    if isinstance(value, dict):
        return {k: sanitize(v) for k, v in value.items() if k != "execution_count" and not k.startswith("image/")}
    return re.sub(r"≈ \S+", "≈ #", value) if isinstance(value, str) else value


def build(chapter: Chapter) -> list[Path]:
    """Make both notebooks; → those files that changed. Same outputs, same file: git stays quiet."""
    solved = make(chapter, blanked=False)
    changed = write(chapter.blank, make(chapter, blanked=True))
    execute(solved, chapter.source.parent)
    _all_passed(solved)
    if not chapter.solved.exists() or stale(chapter.solved, solved) or not _same_outputs(chapter.solved, solved):
        changed += write(chapter.solved, solved)
    return changed


def _all_passed(notebook) -> None:
    """Each check cell of a solved notebook shows a ✓; BuildError with its verdict otherwise."""
    for cell in notebook.cells:
        if cell.metadata.get("peft_teach", {}).get("role") == "check":
            told = "".join(o["data"].get("text/plain", "") for o in cell.outputs if "data" in o)
            if not told.startswith("✓"):
                raise BuildError(f"the answer filled in does not pass:\n{told or cell.source}")


def _same_outputs(path: Path, notebook) -> bool:
    import nbformat

    old = nbformat.read(path, as_version=4)
    return all(sanitize(a.get("outputs", [])) == sanitize(b.get("outputs", [])) for a, b in zip(old.cells, notebook.cells))


def write(path: Path, notebook) -> list[Path]:
    """Write it whole or not at all; → [path] if that changed anything."""
    import nbformat

    text = nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"
    if path.exists() and path.read_text("utf-8") == text:
        return []
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return [path]


def stale(path: Path, fresh) -> str:
    """In what a notebook on disk differs from what its source gives (not in outputs), or ""."""
    import nbformat

    if not path.exists():
        return f"{path.name} is missing"
    old = nbformat.read(path, as_version=4)
    if len(old.cells) != len(fresh.cells):
        return f"{len(old.cells)} cells instead of {len(fresh.cells)}"
    for a, b in zip(old.cells, fresh.cells):
        if (a.cell_type, a.source, a.id) != (b.cell_type, b.source, b.id):
            return f"cell {b.id} is not what the source says"
        if {k: v for k, v in a.metadata.items() if k != "execution"} != dict(b.metadata):
            return f"the metadata of cell {b.id} are not what the source says"
    return "" if dict(old.metadata) == METADATA else "the notebook's metadata are not the builder's"


def check_built(chapter: Chapter) -> list[str]:
    """What is stale or was not executed, a line each; executes nothing."""
    import nbformat

    found = []
    for path, blanked in ((chapter.solved, False), (chapter.blank, True)):
        problem = stale(path, make(chapter, blanked))
        if problem:
            found.append(f"{path.parent.name}/{path.name}: {problem}")
    if not found:
        solved = nbformat.read(chapter.solved, as_version=4)
        if not all(c.execution_count for c in solved.cells if c.cell_type == "code" and c.source.strip()):
            found.append(f"solutions/{chapter.solved.name}: not every cell was executed")
        if any(c.get("outputs") for c in nbformat.read(chapter.blank, as_version=4).cells):
            found.append(f"chapters/{chapter.blank.name}: it has outputs")
    return found
