"""What is remembered of a learner: one small JSON file an exercise, in the learner's own folder.

The folder is `PEFT_TEACH_HOME`, or `.peft_teach` beside the notebook. With `PEFT_TEACH_BUILD=1`
(the builder and CI) and no PEFT_TEACH_HOME every process has a fresh one, removed at its end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from peft_teach.cache import building

_unwritable: dict[str, dict] = {}  # what could not be written: kept for this session


@functools.cache
def _fresh_home() -> Path:
    folder = tempfile.mkdtemp(prefix="peft_teach_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def home() -> Path:
    """The learner's folder; it may not exist yet."""
    if os.environ.get("PEFT_TEACH_HOME"):
        return Path(os.environ["PEFT_TEACH_HOME"])
    return _fresh_home() if building() else Path.cwd() / ".peft_teach"


def read(name: str) -> dict[str, Any]:
    """What is known of `name`; {} when nothing is, or when its file is broken (it is put aside)."""
    path = home() / f"{name}.json"
    if str(path) in _unwritable:
        return dict(_unwritable[str(path)])
    try:
        record = json.loads(path.read_text("utf-8"))
        if isinstance(record, dict):
            return record
    except OSError:
        return {}
    except ValueError:
        pass
    with contextlib.suppress(OSError):
        path.replace(path.with_suffix(".broken"))
    return {}


def write(name: str, /, **changes: Any) -> dict[str, Any]:
    """Change some fields of what is known of `name`; whole or not at all. → all of it."""
    record = read(name) | changes
    path = home() / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f"{name}.", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
        _unwritable.pop(str(path), None)
    except OSError as error:
        if not _unwritable:
            print(f"{home()} can't be written ({error.strerror}): your progress is kept "
                  "for this session only. Set PEFT_TEACH_HOME to a folder of yours.", file=sys.stderr)
        _unwritable[str(path)] = record
    return record
