"""From an answer to the blank that a learner opens: what is kept, and what becomes one line."""

from __future__ import annotations

import ast
import json


def definition(source: str, name: str) -> str:
    """The text of a top-level function, class or assignment, with decorators and the comment above it."""
    lines = source.split("\n")
    for node in ast.parse(source).body:
        if name in _names(node):
            first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
            while first > 1 and lines[first - 2].startswith("#"):
                first -= 1
            return "\n".join(lines[first - 1 : node.end_lineno]) + "\n"
    raise LookupError(f"no top-level definition of {name}")


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)]


def bodies(source: str) -> list[tuple[str, ast.FunctionDef]]:
    """(where, function) for each body that a learner has to write: all but those marked `# given`."""
    lines, found = source.split("\n"), []
    for node in ast.parse(source).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in inside:
            if not isinstance(function, ast.FunctionDef):
                continue
            if any(line.rstrip().endswith("# given") for line in lines[function.lineno - 1 : function.end_lineno]):
                continue
            where = f"{node.name}.{function.name}" if isinstance(node, ast.ClassDef) else function.name
            found.append((where, function))
    return found


def blank(source: str, key: str) -> str:
    """The answer with its bodies taken out.

    Kept: decorators, signatures, docstrings, class attributes, comments between the docstring and
    the body, and whole bodies marked `# given`. A value that is assigned becomes `...`, inside a
    dict display each value does; a line that ends in `# given` stays.
    """
    lines = source.rstrip("\n").split("\n")
    edits = []  # (first line, last line, what stands there instead)
    for where, function in bodies(source):
        body = function.body
        start = function.body[0]
        if isinstance(start, ast.Expr) and isinstance(start.value, ast.Constant) and isinstance(start.value.value, str):
            if len(body) == 1:
                edits.append((start.end_lineno + 1, start.end_lineno, " " * start.col_offset + _stub(key, where)))
                continue
            start = body[1]
        first = min([start.lineno] + [d.lineno for d in getattr(start, "decorator_list", [])])
        head = lines[start.lineno - 1].encode()[: start.col_offset].decode()
        if head.strip() and first == start.lineno:  # a body on the line of its `def`
            stub = " " * (function.col_offset + 4) + _stub(key, where)
            edits.append((first, function.end_lineno, f"{head.rstrip()}\n{stub}"))
        else:
            edits.append((first, function.end_lineno, " " * start.col_offset + _stub(key, where)))
    for node in ast.parse(source).body:
        if lines[node.end_lineno - 1].rstrip().endswith("# given"):
            continue
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Import, ast.ImportFrom)):
            raise LookupError(f"line {node.lineno} can't be blanked: {lines[node.lineno - 1]!r}. Mark it with # given, or take it out")
        if isinstance(node, ast.Assign):
            target = ast.unparse(node.targets[0])
            edits.append((node.lineno, node.end_lineno, f"{target} = {_hollow(node.value)}"))
    for first, last, text in sorted(edits, reverse=True):
        lines[first - 1 : last] = [text]
    return "\n".join(lines) + "\n"


def _stub(key: str, where: str) -> str:
    return f'raise NotImplementedError("{key}: {where}")'


def _hollow(value: ast.expr) -> str:
    if isinstance(value, ast.Dict):
        text = lambda k: isinstance(k, ast.Constant) and isinstance(k.value, str)  # noqa: E731
        shown = [json.dumps(k.value, ensure_ascii=False) if text(k) else ast.unparse(k) for k in value.keys]
        inner = "".join(f"    {k}: {_hollow(v)},\n" for k, v in zip(shown, value.values))
        return "{\n" + inner + "}"
    if isinstance(value, ast.Tuple):
        return "(" + ", ".join("..." for _ in value.elts) + ")"
    return "..."
