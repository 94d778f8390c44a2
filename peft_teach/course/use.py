"""The learner's code travels: from a cell to a later cell, to another chapter, to the grader.

What travels is text: those top-level statements of a notebook that an answer needs, found by the
names that they define and use. `use(key)` runs the text that passed its check last.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import itertools
import linecache
import re
import sys
import symtable
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable

from peft_teach.course import state

# ---------------------------------------------------------------- statements


@dataclass
class Statement:
    """One top-level statement: its text, and the global names that it binds and uses.

    at_once: those that it uses when it is run, and not only when what it defines is called.
    """

    text: str
    node: ast.stmt
    binds: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    at_once: set[str] = field(default_factory=set)

    def starts_afresh(self, name: str) -> bool:
        """Does it define this name whatever it was before? (`x = x + 1`, `class X(X)` and `x += 1` don't.)"""
        if isinstance(self.node, (ast.FunctionDef, ast.ClassDef)):
            return name == self.node.name and name not in self.at_once
        plain = isinstance(self.node, (ast.Assign, ast.AnnAssign)) and name not in self.uses
        return plain or isinstance(self.node, (ast.Import, ast.ImportFrom))


_MAGIC = re.compile(r"^([ \t]*)([!%?].*|[\w.]+\?\??[ \t]*|[\w, ]+=[ \t]*[!%].*)$", re.M)


def without_magics(cell: str) -> str:
    """The cell without lines for the shell or for IPython; a cell magic for something else takes the whole cell."""
    head, _, rest = cell.lstrip().partition("\n")
    if head.startswith("%%"):
        if head[2:].split(" ")[0] not in ("time", "capture", "prun"):
            return ""
        cell = rest
    return _MAGIC.sub(r"\1pass", cell)


def _parse(cell: str) -> tuple[str, ast.Module] | None:
    """(text, tree) of a cell, as it stands or without its magics; None when it does not parse."""
    for text in (cell, without_magics(cell)):
        with contextlib.suppress(SyntaxError, ValueError):
            return text, ast.parse(text)
    return None


def statements(cells: Iterable[str]) -> list[Statement]:
    """The top-level statements of these cells, in order. A cell that does not parse gives none."""
    found = []
    for text, tree in filter(None, map(_parse, cells)):
        lines = text.split("\n")
        for node in tree.body:
            first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
            # Whole lines, so that indentation stays; two statements on one line are unparsed.
            text = "\n".join(lines[first - 1 : node.end_lineno])
            if sum(n.lineno <= node.end_lineno and n.end_lineno >= first for n in tree.body) > 1:
                text = ast.unparse(node)
            found.append(_with_names(Statement(text, node)))
    return found


def _with_names(statement: Statement) -> Statement:
    try:
        table = symtable.symtable(statement.text, "cell", "exec")
    except SyntaxError:  # `await` at top level, say
        return statement

    def walk(table):
        for symbol in table.get_symbols():
            top = table.get_type() == "module"
            if not (top or symbol.is_global()):
                continue
            if symbol.is_referenced():
                statement.uses.add(symbol.get_name())
                if table.get_type() != "function":
                    statement.at_once.add(symbol.get_name())
            if symbol.is_assigned() or (top and (symbol.is_imported() or symbol.is_namespace())):
                statement.binds.add(symbol.get_name())
        for child in table.get_children():
            walk(child)

    walk(table)
    for node in ast.walk(statement.node):  # `Layer.forward = forward` changes Layer
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Store):
            while isinstance(node, (ast.Attribute, ast.Subscript)):
                node = node.value
            if isinstance(node, ast.Name) and node.id in statement.uses and _at_top_level(statement.node):
                statement.binds.add(node.id)
    return statement


def _at_top_level(node: ast.stmt) -> bool:
    return not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def _uses_key(node: ast.stmt, key: str) -> bool:
    """Does the statement call use("key")?"""
    return any(
        isinstance(n, ast.Call) and getattr(n.func, "id", getattr(n.func, "attr", "")) == "use"
        and n.args and isinstance(n.args[0], ast.Constant) and n.args[0].value == key
        for n in ast.walk(node)
    )


def extract(cells: Iterable[str], name: str, key: str = "") -> str | None:
    """The text of the statements that `name` needs, in the notebook's order; None if it is not defined.

    Statements that call use(key) are dropped: an answer can't stand on itself.
    """
    there = [s for s in statements(cells) if not (key and _at_top_level(s.node) and _uses_key(s.node, key))]
    star = lambda s: isinstance(s.node, ast.ImportFrom) and s.node.names[0].name == "*"  # noqa: E731
    future = lambda s: isinstance(s.node, ast.ImportFrom) and s.node.module == "__future__"  # noqa: E731
    if not any(name in s.binds for s in there):
        return None
    wanted, seen, keep = [name], set(), {i for i, s in enumerate(there) if star(s) or future(s)}
    while wanted:
        current = wanted.pop()
        if current in seen:
            continue
        seen.add(current)
        for i in reversed([i for i, s in enumerate(there) if current in s.binds]):
            keep.add(i)
            wanted += there[i].uses
            if there[i].starts_afresh(current):
                break
    # A cell that was run again may stand behind what needs it: imports come first, in an order that no
    # re-run changes, and then each statement after those that it needs when it is run.
    imports = [i for i in keep if isinstance(there[i].node, (ast.Import, ast.ImportFrom))]
    ordered = sorted(imports, key=lambda i: (not future(there[i]), not star(there[i]), i if star(there[i]) else there[i].text))

    def emit(i: int) -> None:
        if i in ordered or i in under_way:
            return
        under_way.add(i)
        for j in sorted(keep):
            if j > i and there[j].binds & there[i].at_once and not there[j].at_once & there[i].binds:
                emit(j)
        ordered.append(i)

    under_way: set[int] = set()
    for i in sorted(keep):
        emit(i)
    return "\n\n".join(dict.fromkeys(there[i].text for i in ordered if i in imports)) + "\n\n" * bool(imports) + (
        "\n\n".join(there[i].text for i in ordered if i not in imports) + "\n")


def live_cells() -> list[str]:
    """What was run in this notebook so far, oldest first; [] outside a notebook."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    if not shell or not shell.history_manager:
        return []
    kept = list(shell.history_manager.input_hist_raw)
    if any(kept):
        return kept
    # nbval runs cells without keeping them as history; the compiler has them for its tracebacks.
    return ["".join(linecache.cache[name][2]) for name in shell.compile._filename_map if name in linecache.cache]


def source_of(answer: Any, key: str) -> tuple[str, str] | None:
    """(name, source) of a function or class that was written in this notebook or in a file."""
    if not (inspect.isclass(answer) or inspect.isfunction(answer)):
        return None
    there = vars(sys.modules[answer.__module__]) if answer.__module__ in sys.modules else {}
    # Its own name, if it stands under that; a lambda or what a decorator made stands under another one.
    names = sorted((n for n, v in there.items() if v is answer), key=lambda n: n != answer.__name__) or [answer.__name__]
    if answer.__module__ == "__main__" and live_cells():
        cells = live_cells()
    else:
        try:
            cells = [Path(inspect.getsourcefile(answer)).read_text("utf-8")]
        except (TypeError, OSError):
            return None
    found = ((name, extract(cells, name, key)) for name in names)
    return next(((name, source) for name, source in found if source), None)


# ---------------------------------------------------------------- running it

_count = itertools.count()


def run_source(source: str, name: str, label: str = "an answer") -> Any:
    """Run the text in a module of its own; → what `name` is there. Tracebacks show its lines."""
    module = types.ModuleType(f"peft_teach_answer_{next(_count)}")
    module.__file__ = f"<{label} {hashlib.sha256(source.encode()).hexdigest()[:8]}>"
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(True), module.__file__)
    sys.modules[module.__name__] = module  # inspect.getsource of a class looks here
    exec(compile(source, module.__file__, "exec", dont_inherit=True), module.__dict__)
    if name not in module.__dict__:
        raise NameError(f"the statements run, but they don't define {name}")
    return module.__dict__[name]


_origins: dict[int, tuple[Any, str]] = {}  # id → (the object, kept so that the id stays its own; whose)


def whose(answer: Any) -> str:
    """ "your own" or "the reference": where an object that came from `use` comes from."""
    return _origins[id(answer)][1] if id(answer) in _origins else "your own"


def came_from_use(answer: Any) -> bool:
    return id(answer) in _origins


def use(key: str) -> Any:
    """Your own answer to the exercise in the last version that passed its check, else the reference.

    A line says which it is. KeyError for an unknown key.
    """
    from peft_teach.course.exercise import find
    from peft_teach.course.show import Card

    exercise = find(key)
    record = state.read(key)
    answer, notes = None, []
    if record.get("source"):
        try:
            answer = run_source(record["source"], record["name"], f"your {key}")
            origin, mark = "your own", "✓"
            now = extract(live_cells(), record["name"], key)
            if now is not None and now != record["source"]:
                notes.append("This is the version that passed last. The notebook's text has changed since, and has not passed.")
        except Exception as error:
            notes.append(f"Your own no longer runs here ({type(error).__name__}: {error}).")
    if exercise.kind == "answer" and "value" in record:
        answer, origin, mark = record["value"], "your own", "✓"
    if answer is None:
        answer, origin, mark = exercise.reference(), "the reference", "○"
        notes.append("Yours takes its place here once it passes its check.")
    if exercise.kind != "answer":
        _origins[id(answer)] = (answer, origin)
    Card(f"{mark} {exercise.name}: {origin}", notes).display()
    return answer
