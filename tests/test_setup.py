"""The set-up: start.py, the pins and what is made from them. Nothing here uses the network."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem + "_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


start = load(ROOT / "start.py")
pins = load(ROOT / "tools" / "pins.py")


# ---- pins -------------------------------------------------------------------------------------


def test_environment_yml_is_current():
    found = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert found == pins.environment(), "stale: run `python tools/pins.py`"


def test_every_requirement_has_a_pin_inside_its_range():
    exact = pins.pins()
    for group, lines in pins.requirements().items():
        for requirement in map(Requirement, lines):
            version = exact.get(pins.normal(requirement.name))
            assert version, f"{requirement.name} ({group or 'dependencies'}) has no pin"
            assert requirement.specifier.contains(version), f"{requirement}: the pin is {version}"
            assert "<" in str(requirement.specifier), f"{requirement} has no upper end"


def test_pins_are_exact_sorted_and_without_local_versions():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in entries)
    names = [line.split("==")[0] for line in entries]
    assert names == sorted(set(names))


def test_the_extras_that_start_installs_are_those_of_environment_yml():
    assert start.EXTRAS.split(",") == list(pins.EXTRAS)


def test_import_loads_torch_and_safetensors_and_no_more():
    code = "import sys, peft_teach; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(loaded.stdout.split())
    assert {"torch", "safetensors"} <= names
    heavy = {"peft", "transformers", "bitsandbytes", "matplotlib", "hypothesis", "IPython", "jaxtyping"}
    assert not names & heavy


# ---- start.py: when .venv is made, kept or filled ---------------------------------------------

WANTED = "hash\n/home/me/peft_teach\n"


@pytest.mark.parametrize(
    "stamp, works, todo",
    [
        (None, False, "make"),  # nothing there, or half made: no python, or no whole pip
        (WANTED, False, "make"),  # the Python it was made from is gone
        (None, True, "install"),  # interrupted while installing
        ("other\n/home/me/peft_teach\n", True, "install"),  # the pins changed
        ("hash\n/somewhere/else\n", True, "make"),  # the folder was moved
        (WANTED, True, "ready"),
    ],
)
def test_what_to_do(stamp, works, todo):
    assert start.what_to_do(stamp, WANTED, works) == todo


def test_a_missing_venv_does_not_work(monkeypatch, tmp_path):
    monkeypatch.setattr(start, "PYTHON", str(tmp_path / "bin" / "python"))
    assert not start.venv_works()


def test_a_torch_whose_install_was_killed_is_told_of_as_missing(monkeypatch, tmp_path, capsys):
    """pip writes METADATA before RECORD: until it is dropped, a half torch looks like one that is there."""
    half = tmp_path / "torch-1.dist-info"
    half.mkdir()
    monkeypatch.setattr(start, "STAMP", str(tmp_path / "stamp"))
    monkeypatch.setattr(start, "venv_works", lambda: True)
    monkeypatch.setattr(start, "site_packages", lambda: str(tmp_path))
    monkeypatch.setattr(start, "installed", lambda name: start.pinned(name) if half.exists() else None)
    monkeypatch.setattr(start, "check_disk", lambda *_: None)
    monkeypatch.setattr(start, "served_cuda", lambda version: [])
    steps = []
    monkeypatch.setattr(start, "step", lambda what, command: steps.append(what))
    start.set_up()
    assert "355 MiB" in capsys.readouterr().out
    assert steps[-2].startswith("install torch") and (tmp_path / "stamp").exists()


def test_stamp_follows_pins_and_place_but_not_line_ends(tmp_path):
    (tmp_path / "constraints.txt").write_bytes(b"torch==2.13.0\n")
    (tmp_path / "pyproject.toml").write_bytes(b"[project]\n")
    first = start.wanted_stamp(str(tmp_path))
    assert first.splitlines()[1] == str(tmp_path)
    (tmp_path / "constraints.txt").write_bytes(b"torch==2.13.0\r\n")
    assert start.wanted_stamp(str(tmp_path)) == first
    (tmp_path / "constraints.txt").write_bytes(b"torch==2.13.1\n")
    assert start.wanted_stamp(str(tmp_path)) != first


def test_half_installed_packages_are_dropped(tmp_path):
    for name in ("whole-1.dist-info", "half-1.dist-info", "~orch", "torch"):
        (tmp_path / name).mkdir()
    (tmp_path / "whole-1.dist-info" / "RECORD").touch()
    assert start.drop_half_installed(str(tmp_path)) == ["half-1.dist-info", "~orch"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torch", "whole-1.dist-info"]


def test_pinned_reads_constraints():
    assert start.pinned("torch") == pins.pins()["torch"]
    with pytest.raises(start.Failed, match="no pin for nothing"):
        start.pinned("nothing")


def test_full_disk_is_seen_before_anything_is_downloaded(monkeypatch):
    usage = type("Usage", (), {"free": 50 * 2**20})
    monkeypatch.setattr(start.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(start.Failed, match="50 MiB are free"):
        start.check_disk(300, 2000)


# ---- start.py: failures in plain words --------------------------------------------------------


@pytest.mark.parametrize(
    "line, meaning",
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: Could not install packages due to an OSError: [WinError 5] Access is denied: 'x'", "may not be written"),
        ("PermissionError: [Errno 13] Permission denied: '/x/.venv'", "may not be written"),
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(Connection refused)'\n"
            "ERROR: Could not find a version that satisfies the requirement pip==26.3 (from versions: none)\n"
            "ERROR: No matching distribution found for pip==26.3",
            "can't be reached",
        ),
        ("urllib3.exceptions.ReadTimeoutError: Read timed out.", "can't be reached"),
        ("SSLError(SSLCertVerificationError(1, 'certificate verify failed'))", "certificate"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no such package"),
        ("error: command 'gcc' failed: No such file or directory", "no compiler"),
        ("error: Microsoft Visual C++ 14.0 or greater is required.", "no compiler"),
        ("The virtual environment was not created because ensurepip is not available.", "python3-venv"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "damaged"),
        ("ERROR: ResolutionImpossible: for help visit ...", "conflict"),
    ],
)
def test_explain_says_what_failed_and_what_to_do(line, meaning):
    text = start.explain("install torch 2.13.0", 1, line.splitlines())
    assert text.startswith("This step failed: install torch 2.13.0 (exit status 1).")
    assert meaning in text
    assert line.splitlines()[-1] in text
    assert "What to do: " in text
    assert "Traceback" not in text


def test_explain_without_a_known_cause():
    assert "report these lines" in start.explain("x", 3, ["ERROR: never seen"])
    assert "memory" in start.explain("x", -9, [])


# ---- start.py: CPU or CUDA --------------------------------------------------------------------

LINUX = {"platform_system": "Linux", "python_version": "3.13", "platform_machine": "x86_64", "sys_platform": "linux"}
WINDOWS = {"platform_system": "Windows", "python_version": "3.13", "platform_machine": "AMD64", "sys_platform": "win32"}
CUDA_BUILD = [
    "filelock",
    "setuptools>=77.0.3",
    'cuda-toolkit[cublas,cudart]==13.0.3; platform_system == "Linux"',
    'cuda-bindings<14,>=13.0.3; platform_system == "Linux" and python_version < "3.15"',
    'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"',
    'optree>=0.13.0; extra == "optree"',
]
CPU_BUILD = ["filelock", "setuptools>=77.0.3", 'optree>=0.13.0; extra == "optree"']


def report(requires, environment):
    """The parts of pip's report that are read."""
    return {"environment": environment, "install": [{"metadata": {"name": "torch", "requires_dist": requires}}]}


def test_cuda_build_is_seen_where_its_markers_apply():
    assert start.cuda_packages(report(CUDA_BUILD, LINUX)) == ["cuda-toolkit", "cuda-bindings", "nvidia-cudnn-cu13"]
    assert start.cuda_packages(report(CUDA_BUILD, WINDOWS)) == []
    assert start.cuda_packages(report(CPU_BUILD, LINUX)) == []
    assert start.cuda_packages(report(None, LINUX)) == []
    assert start.cuda_packages({}) == []


@pytest.mark.parametrize(
    "marker, applies",
    [
        ('platform_system == "Linux"', True),
        ('platform_system != "Linux"', False),
        ('platform_system == "Linux" and platform_machine == "aarch64"', False),
        ("(sys_platform == 'linux' or sys_platform == 'win32') and python_version < '3.9'", False),
        ('python_version >= "3.9"', True),  # 3.13 is newer than 3.9, though "3.13" < "3.9" as text
        ("'linux' in sys_platform", True),
        ('extra == "cuda"', False),
        ("not a marker at all", True),
    ],
)
def test_markers(marker, applies):
    assert start.marker_applies(marker, dict(LINUX, extra="")) is applies


def test_the_notice_names_the_command_and_no_host():
    notice = start.cuda_notice("2.13.0")
    assert "-m pip install torch==2.13.0 --index-url URL" in notice
    assert "http" not in notice


# ---- start.py: how it is called ---------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["labs"], ["setup", "extra"], ["--lab"]])
def test_wrong_use_exits_2_with_usage(arguments, capsys):
    assert start.main(arguments) == 2
    assert "python start.py lab" in capsys.readouterr().err


def test_help_exits_0(capsys):
    assert start.main(["--help"]) == 0
    assert "python start.py test" in capsys.readouterr().out


def test_failures_and_interrupts_exit_1_without_a_traceback(monkeypatch, capsys):
    for raised, said in [
        (start.Failed("This step failed"), "This step failed"),
        (KeyboardInterrupt(), "goes on where it stopped"),
        (OSError(28, "No space left on device"), "disk is full"),
    ]:

        def set_up():
            raise raised

        monkeypatch.setattr(start, "set_up", set_up)
        monkeypatch.setattr(start.signal, "signal", lambda *_: None)
        assert start.main(["setup"]) == 1
        assert said in capsys.readouterr().err


def test_commands_pass_options_and_the_exit_status_through(monkeypatch):
    called = []
    monkeypatch.setattr(start, "set_up", lambda: None)
    monkeypatch.setattr(start.signal, "signal", lambda *_: None)
    monkeypatch.setattr(start, "run_in_venv", lambda call: called.append(call) or 5)
    assert start.main(["test", "-k", "lora"]) == 5
    assert start.main(["lab", "--no-browser"]) == 5
    assert called == [["-m", "pytest", "-k", "lora"], ["-m", "peft_teach.cli", "lab", "--no-browser"]]


def test_an_old_python_hands_over_or_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(start, "ask_python", lambda command: None)
    assert start.hand_over(["lab"]) == 1
    assert "needs Python 3.11+" in capsys.readouterr().err


def test_start_parses_on_old_pythons():
    tree = ast.parse((ROOT / "start.py").read_text(encoding="utf-8"), feature_version=(3, 4))
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Nonlocal)), ast.dump(node)
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            assert not arguments.kwonlyargs and not arguments.posonlyargs and node.returns is None
            assert all(argument.annotation is None for argument in arguments.args)
        if isinstance(node, ast.Raise):
            assert node.cause is None


def test_the_makefile_only_calls_start_and_the_tool():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipes = [line.strip() for line in text.splitlines() if line.startswith("\t")]
    allowed = r"\$\(PYTHON\) start\.py (lab|test|setup)( \$\(ARGS\))?|\$\(VENV_PYTHON\) -m (peft_teach\.cli build|benchmarks) \$\(ARGS\)"
    assert recipes and all(re.fullmatch(allowed, recipe) for recipe in recipes)


def test_ci_calls_make_test():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(("make", "python"))] == ["make test"]
