# -*- coding: utf-8 -*-
"""Set up this course and start it, with nothing but Python 3.11 or newer and a package index.

    python start.py lab [options]    open the chapters in JupyterLab
    python start.py test [options]   run every test; options go to pytest
    python start.py setup            only make the environment, in .venv

Each makes .venv first if it is missing or if the pins have changed. An interrupted set-up goes on
where it stopped: run the same command again.
"""

# This file must parse on any Python that someone may type `python` for (2.7 too), and `hand_over`
# must run there, so that it can say what is needed. Hence the old syntax: no f-strings, no annotations.
from __future__ import print_function

import ast
import hashlib
import json
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
WINDOWS = os.name == "nt"
PYTHON = os.path.join(VENV, "Scripts", "python.exe") if WINDOWS else os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "peft_teach.stamp")

OLDEST = (3, 11)
TESTED = ("3.13", "3.12", "3.11")
EXTRAS = "lab,quant,dev"

# Measured on Linux x86_64 with Python 3.11, in MiB: the wheels, and .venv as `du` sees it. With CUDA,
# the wheels were measured and what they unpack to was added up.
DOWNLOAD_CPU, DISK_CPU = 355, 1620
DOWNLOAD_CUDA, DISK_CUDA = 2780, 5400

AGAIN = "Run the same command again: it goes on where it stopped."


class Failed(Exception):
    """A step that failed; its text is all that the user reads."""


# ---- which Python -----------------------------------------------------------------------------


def candidates():
    """Commands that may be a newer Python than the one that runs this file."""
    if WINDOWS:
        return [["py", "-" + version] for version in TESTED + ("3",)]
    return [["python" + version] for version in TESTED + ("3",)]


def ask_python(command):
    """(path, version) of the interpreter that `command` starts, or None."""
    probe = "import sys; print(sys.executable); print('%d.%d' % sys.version_info[:2])"
    try:
        process = subprocess.Popen(command + ["-c", probe], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        lines = process.communicate()[0].decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    if process.returncode != 0 or len(lines) != 2:
        return None
    return lines[0], tuple(int(part) for part in lines[1].split("."))


def hand_over(arguments):
    """Run this file again under a newer Python, if there is one."""
    for command in candidates():
        found = ask_python(command)
        if found and found[1] >= OLDEST:
            return wait_for(subprocess.Popen([found[0], os.path.abspath(__file__)] + arguments))
    print(
        "peft_teach needs Python 3.11+; this is Python %d.%d, and no newer one was found.\n"
        "Install Python 3.13 (your system's package manager, or python.org), then run the same "
        "command again." % sys.version_info[:2],
        file=sys.stderr,
    )
    return 1


def base_python():
    """The interpreter to make .venv with: never the one inside it."""
    if os.path.realpath(sys.prefix) == os.path.realpath(VENV):
        return getattr(sys, "_base_executable", sys.executable)
    return sys.executable


# ---- is .venv as it should be -----------------------------------------------------------------


def wanted_stamp(root=ROOT):
    """Two lines: a hash of everything that decides what is installed, and the folder."""
    digest = hashlib.sha256(EXTRAS.encode())
    for name in ("constraints.txt", "pyproject.toml"):
        with open(os.path.join(root, name), "rb") as file:
            # Git may have changed the line ends; that changes no pin.
            digest.update(file.read().replace(b"\r\n", b"\n"))
    return "%s\n%s\n" % (digest.hexdigest(), root)


def read_stamp():
    try:
        with open(STAMP, "rb") as file:
            return file.read().decode("utf-8", "replace")
    except OSError:
        return None


def what_to_do(stamp, wanted, works):
    """'ready', 'install' (into what is there) or 'make' (a new .venv).

    `works`: its python runs and has pip. A folder that was moved is made anew, because scripts and
    kernels inside .venv name the old place.
    """
    if not works:
        return "make"
    if stamp == wanted:
        return "ready"
    if stamp is not None and stamp.splitlines()[1:] != wanted.splitlines()[1:]:
        return "make"
    return "install"


def venv_works():
    """True if there is a .venv, with a python that runs and a whole pip."""
    probe = "import sys; from importlib.metadata import files; sys.exit(not files('pip'))"
    try:
        return quietly([PYTHON, "-c", probe])[0] == 0
    except OSError:
        return False


def site_packages():
    code, text = quietly([PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    return text.strip()


def drop_half_installed(folder):
    """Remove what a killed pip left, so that pip installs it again instead of trusting it.

    pip writes RECORD last: a .dist-info without one is a package that was not finished. Folders
    that begin with ~ are what it had set aside to remove.
    """
    dropped = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        unfinished = name.endswith(".dist-info") and not os.path.exists(os.path.join(path, "RECORD"))
        if os.path.isdir(path) and (unfinished or name.startswith("~")):
            shutil.rmtree(path, ignore_errors=True)
            dropped.append(name)
    return dropped


def pinned(name):
    with open(os.path.join(ROOT, "constraints.txt")) as file:
        for line in file:
            if line.startswith(name + "=="):
                return line.split("==")[1].strip()
    raise Failed("constraints.txt has no pin for %s. Is this a whole clone? `git status` tells." % name)


def installed(name):
    """The version in .venv without its local part (`+cpu`), or None."""
    probe = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    code, text = quietly([PYTHON, "-c", probe, name])
    return text.strip().split("+")[0] if code == 0 else None


# ---- running things ---------------------------------------------------------------------------


def child_environment():
    environment = dict(os.environ)
    environment.pop("PYTHONHOME", None)
    environment.pop("__PYVENV_LAUNCHER__", None)
    environment["PIP_USER"] = "0"  # a user's own `pip config` may say otherwise, which fails in a venv
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    return environment


def quietly(command):
    """(exit status, standard output) of a command that shows nothing."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=child_environment()
    )
    text = process.communicate()[0].decode("utf-8", "replace")
    return process.returncode, text


def step(what, command):
    """Run one step of the set-up. Its errors are shown, and kept to be explained."""
    print("\n-- %s" % what, flush=True)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT, env=child_environment())
    lines = []
    try:
        # Standard output goes straight to the terminal, so that pip can draw its progress bars.
        for raw in process.stderr:
            line = raw.decode("utf-8", "replace").rstrip()
            lines.append(line)
            print(line, file=sys.stderr)
        code = process.wait()
    except KeyboardInterrupt:
        stop(process)
        raise
    if code != 0:
        raise Failed(explain(what, code, lines))


def stop(process):
    """End pip so that it can still remove its temporary files, which may be large.

    After Ctrl-C it has been told already; after a SIGTERM to this program it has not.
    """
    tell_again = process.terminate if WINDOWS else lambda: process.send_signal(signal.SIGINT)
    for seconds, then in ((2, tell_again), (10, process.kill)):
        try:
            process.wait(timeout=seconds)
            return
        except subprocess.TimeoutExpired:
            then()
    process.wait()


CAUSES = [
    # (what pip or venv says, what that means, what to do next); the first that fits is told.
    (
        r"no space left|errno 28|not enough space|disk quota",
        "The disk is full.",
        "Make room where this folder lies and where pip keeps its cache and its temporary files "
        "(`pip cache dir`; the environment variable TMPDIR moves the latter). " + AGAIN,
    ),
    (
        r"permission denied|errno 13\b|access is denied|winerror 5\b|read-only file system",
        "A file or folder may not be written.",
        "Clone into a folder of your own, don't use sudo, and on Windows close every program that "
        "still uses .venv (JupyterLab, an editor). " + AGAIN,
    ),
    (
        r"ensurepip is not|no module named '?(venv|ensurepip)|ensurepip.*returned non-zero",
        "This Python comes without venv or ensurepip.",
        "On Debian and Ubuntu: `sudo apt install python3-venv`. Elsewhere, install Python 3.11 to "
        "3.13 from python.org. " + AGAIN,
    ),
    (
        r"certificate.verify.failed|sslerror|ssl: ",
        "The package index was reached, but its certificate was not accepted.",
        "Behind a company proxy, give pip that proxy's certificate: "
        "`pip config set global.cert FILE`. " + AGAIN,
    ),
    (
        r"failed to establish a new connection|newconnectionerror|max retries|name resolution|getaddrinfo"
        r"|connection (refused|reset|aborted|broken)|remotedisconnected|timed out|timeouterror|proxyerror"
        r"|network is unreachable|incompleteread|connection to \S+ failed",
        "The package index can't be reached.",
        "Check the network and, if you use one, the proxy or mirror (`pip config list`, "
        "HTTPS_PROXY, PIP_INDEX_URL). What was downloaded is kept. " + AGAIN,
    ),
    (
        r"do not match the hashes|bad ?zip ?file|invalid wheel|file is not a zip",
        "A downloaded file is damaged.",
        "Empty pip's cache with `pip cache purge`. " + AGAIN,
    ),
    (
        r"long path|filename or extension is too long|errno 36",
        "A path became too long for this system.",
        "Clone into a folder with a short path, such as C:\\peft_teach. " + AGAIN,
    ),
    (
        r"resolutionimpossible|conflicting dependencies",
        "The pins of this course conflict with another constraint.",
        "See whether pip is told one by `pip config list` or by PIP_CONSTRAINT, and lift it. " + AGAIN,
    ),
    (
        r"microsoft visual c\+\+|command '?\S*(gcc|cc|clang|g\+\+|cl\.exe)'? failed|unknown compiler"
        r"|(gcc|cc|clang|cmake|cargo|rustc)\S*: (command )?not found|no such file or directory: '(gcc|cc|clang|cmake|cargo)"
        r"|failed.building.wheel|failed-wheel-build|metadata-generation-failed|subprocess-exited-with-error",
        "A package had to be built here because there is no ready-made one for this Python and "
        "system, and building it failed (often there is no compiler).",
        "Use Python 3.11, 3.12 or 3.13 on Linux, Windows or an Apple-silicon Mac: every package "
        "has a ready-made build there.",
    ),
    (
        r"no matching distribution|could not find a version|not a supported wheel|requires a different python",
        "The package index has no such package for this Python and system.",
        "Use a 64-bit Python 3.11, 3.12 or 3.13 on Linux (not Alpine), Windows or an Apple-silicon "
        "Mac; torch has no builds for Intel Macs. If you use a mirror, see whether it has the "
        "version that pip names above.",
    ),
]


def explain(what, code, lines):
    """What failed and what to do next, in plain words."""
    lines = [line for line in lines if line.strip()]
    tail = ([line for line in lines if not line.startswith("WARNING:")] or lines)[-6:]
    text = "\n".join(lines).lower()
    meaning, advice = "", "If that is no help: " + AGAIN + " If it fails again, report these lines."
    for pattern, cause, cure in CAUSES:
        if re.search(pattern, text):
            meaning, advice = cause, cure
            break
    else:
        if code in (-9, 137):
            meaning, advice = "The system ended it, most likely for want of memory.", "Close other programs. " + AGAIN
    parts = ["This step failed: %s (exit status %d)." % (what, code)]
    if meaning:
        parts.append(meaning)
    if tail:
        parts.append("Its last lines:\n" + "\n".join("    " + line for line in tail))
    parts.append("What to do: " + advice)
    return "\n".join(parts)


# ---- CPU or CUDA ------------------------------------------------------------------------------


COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda part, whole: part in whole,
    ast.NotIn: lambda part, whole: part not in whole,
}


def marker_applies(marker, environment):
    """Evaluate a marker such as `platform_system == "Linux" and python_version < "3.15"`.

    Its grammar is a part of Python's, so Python parses it; only names, strings, comparisons, `and`,
    `or` are evaluated. What can't be read is taken to apply: then we say too much, not too little.
    """

    def value(node):
        if isinstance(node, ast.BoolOp):
            results = [value(part) for part in node.values]
            return all(results) if isinstance(node.op, ast.And) else any(results)
        if isinstance(node, ast.Name):
            return environment.get(node.id, "")
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = value(node.left), value(node.comparators[0])
            names = [side.id for side in (node.left, node.comparators[0]) if isinstance(side, ast.Name)]
            if any(name.endswith("version") for name in names):
                left, right = ([int(n) for n in re.findall(r"\d+", side)] for side in (left, right))
            return COMPARE[type(node.ops[0])](left, right)
        return ast.literal_eval(node)

    try:
        return bool(value(ast.parse(marker.strip(), mode="eval").body))
    except (SyntaxError, ValueError, KeyError, TypeError):
        return True


def cuda_packages(report):
    """The CUDA packages that torch would bring here, by pip's report on it (`--report`)."""
    environment = dict(report.get("environment", {}), extra="")
    found = []
    for item in report.get("install", []):
        for requirement in item.get("metadata", {}).get("requires_dist") or []:
            head, _, marker = requirement.partition(";")
            name = re.match(r"[A-Za-z0-9._-]+", head.strip())
            if not name or not name.group().lower().startswith(("nvidia-", "nvidia_", "cuda-", "cuda_")):
                continue
            if not marker.strip() or marker_applies(marker, environment):
                found.append(name.group())
    return found


def served_cuda(version):
    """The CUDA packages of the torch that the index would serve; empty if that can't be told."""
    code, text = quietly(
        [PYTHON, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
        + ["--report", "-", "torch==" + version]
    )
    if code != 0:
        return []  # installing it will fail too, and say why
    try:
        return cuda_packages(json.loads(text))
    except ValueError:
        return []


def cuda_notice(version):
    return (
        "The package index serves torch with CUDA: about {0} MiB to download and {1} MiB of disk in "
        "all,\ninstead of {2} and {3}. That is of use with an NVIDIA GPU only. For the smaller CPU "
        "build, stop this\n(Ctrl-C) and run\n\n    {4} -m pip install torch=={5} --index-url URL\n\n"
        "where URL is the CPU index named on PyTorch's Get started page. Then run the same command "
        "again:\nit keeps the torch that it finds.".format(
            DOWNLOAD_CUDA, DISK_CUDA, DOWNLOAD_CPU, DISK_CPU, shown(PYTHON), version
        )
    )


def shown(path):
    """A path as someone would type it here."""
    path = os.path.relpath(path) if os.path.realpath(os.getcwd()) == os.path.realpath(ROOT) else path
    return '"%s"' % path if " " in path else path


# ---- the set-up -------------------------------------------------------------------------------


def size_of(folder):
    """MiB in a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                pass
    return total // 2**20


def check_disk(download, disk):
    """Refuse to begin what can't end: .venv and pip's cache, less what is there already."""
    need = max(disk + download - size_of(VENV), 100)
    free = shutil.disk_usage(ROOT).free // 2**20
    if free < need:
        raise Failed(
            "Not enough disk: this needs about %d MiB (.venv and pip's cache of what it downloads), "
            "and %d MiB are free where %s lies.\nWhat to do: make room. %s" % (need, free, ROOT, AGAIN)
        )


def set_up():
    """Make .venv what the pins say. Quick when it is so already."""
    wanted = wanted_stamp()
    todo = what_to_do(read_stamp(), wanted, venv_works())
    if todo == "ready":
        return
    begun = time.time()
    print("Setting up peft_teach in %s with Python %d.%d." % ((VENV,) + sys.version_info[:2]))
    if "%d.%d" % sys.version_info[:2] not in TESTED:
        print("Note: this course was tried with Python 3.11 to 3.13 only.")
    if todo == "install":
        if os.path.exists(STAMP):
            os.remove(STAMP)  # from here until the end, .venv is unfinished
        drop_half_installed(site_packages())
    torch = pinned("torch")
    torch_is_missing = todo == "make" or installed("torch") != torch
    if torch_is_missing:
        print(
            "It downloads about %d MiB (what pip's cache has already is not fetched again) and takes "
            "about\n%d MiB of disk. Where the index serves torch with CUDA it is more; you are told "
            "before." % (DOWNLOAD_CPU, DISK_CPU)
        )
    else:
        print("It downloads only what has changed or is still missing.")
    check_disk(DOWNLOAD_CPU, DISK_CPU)

    if todo == "make":
        # --clear empties a half-made folder.
        step("make an empty environment", [base_python(), "-m", "venv", "--clear", VENV])
    pip = [PYTHON, "-m", "pip"]
    if installed("pip") != pinned("pip"):
        step("get pip %s" % pinned("pip"), pip + ["install", "pip==" + pinned("pip")])
    if torch_is_missing:
        print("\n-- ask the index which build of torch it serves", flush=True)
        cuda = served_cuda(torch)
        if cuda:
            print("\n" + cuda_notice(torch))
            check_disk(DOWNLOAD_CUDA, DISK_CUDA)
            if sys.stdin is not None and sys.stdin.isatty():
                print("\nGoing on with the CUDA build in 10 seconds.", flush=True)
                time.sleep(10)
        step("install torch %s" % torch, pip + ["install", "-c", "constraints.txt", "torch==" + torch])
    step(
        "install the course and what it needs",
        pip + ["install", "-c", "constraints.txt", "--build-constraint", "constraints.txt"]
        + ["-e", ".[%s]" % EXTRAS],
    )
    with open(STAMP, "wb") as file:
        file.write(wanted.encode("utf-8"))
    print("\nSet up in %d s; .venv holds %d MiB." % (time.time() - begun, size_of(VENV)), flush=True)


# ---- what was asked for -----------------------------------------------------------------------


def wait_for(process):
    """The exit status of a program that the user talks to.

    Ctrl-C belongs to it: JupyterLab asks whether to stop, pytest writes its report.
    """
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            pass


def run_in_venv(arguments):
    return wait_for(subprocess.Popen([PYTHON] + arguments, cwd=ROOT, env=child_environment()))


def interrupt(*_):
    raise KeyboardInterrupt


def main(arguments):
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    if not arguments or arguments[0] not in ("lab", "test", "setup") or (arguments[0] == "setup" and arguments[1:]):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    if sys.version_info < OLDEST:
        return hand_over(arguments)
    command, rest = arguments[0], arguments[1:]
    try:
        signal.signal(signal.SIGTERM, interrupt)
        set_up()
    except Failed as failure:
        print("\n%s" % failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. " + AGAIN, file=sys.stderr)
        return 1
    except OSError as error:
        print("\n" + explain("set up .venv", 1, [str(error)]), file=sys.stderr)
        return 1
    if command == "lab":
        return run_in_venv(["-m", "peft_teach.cli", "lab"] + rest)
    if command == "test":
        return run_in_venv(["-m", "pytest"] + rest)  # conftest.py sets what tests need
    print("Ready. `python start.py lab` opens the chapters, `python start.py test` runs the tests.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
