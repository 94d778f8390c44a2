"""Write environment.yml, for conda users, from pyproject.toml and constraints.txt.

    python tools/pins.py            write it
    python tools/pins.py --check    exit status 1 if it is stale

Only direct dependencies are listed; conda finds the rest. It was compared with the pins, not solved.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

EXTRAS = ("lab", "quant", "dev")
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
# Left to pip: not known to be on conda-forge in the pinned version.
ONLY_PIP = {"gguf"}

HEADER = """\
# Made from pyproject.toml and constraints.txt by tools/pins.py; a test says when it is stale.
# It has not been solved by conda. The tested way is `python start.py setup`.
"""


def normal(name: str) -> str:
    """A package's name in the one spelling that all indexes accept."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(root: Path = ROOT) -> dict[str, str]:
    """Exact versions, by normalised name."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in entries}


def requirements(root: Path = ROOT) -> dict[str, list[str]]:
    """The requirement lines of pyproject.toml: `""` has the package's own, then one list an extra."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def environment(root: Path = ROOT) -> str:
    exact, groups = pins(root), requirements(root)
    conda, pip = [], []
    for group in ("", *EXTRAS):
        for line in groups[group]:
            name = normal(re.match(r"[\w.-]+", line).group())
            if name in ONLY_PIP:
                pip.append(f"{name}=={exact[name]}")
            else:
                conda.append(f"{CONDA_NAMES.get(name, name)}={exact[name]}")
    text = HEADER + "name: peft-teach\nchannels:\n  - conda-forge\ndependencies:\n"
    text += "  - python>=3.11,<3.14\n  - pip\n"
    text += "".join(f"  - {entry}\n" for entry in conda)
    text += "  - pip:\n" + "".join(f"      - {entry}\n" for entry in pip)
    return text + "      - -e .\n"


def main(arguments: list[str]) -> int:
    target = ROOT / "environment.yml"
    text = environment()
    if arguments == ["--check"]:
        stale = not target.exists() or target.read_text(encoding="utf-8") != text
        if stale:
            print("environment.yml is stale: run `python tools/pins.py`", file=sys.stderr)
        return int(stale)
    if arguments:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    target.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
