"""What travels of a notebook is what an answer needs, and `use` runs it elsewhere."""

import inspect
import sys
import textwrap
import traceback
import types

import pytest
import torch

import peft_teach
from peft_teach.course import check, use, whose
from peft_teach.course.use import extract, run_source

KEY = "lora_layer.delta_weight"
MINE = """
def scale(lora_alpha, r, use_rslora):
    return lora_alpha / (r**0.5 if use_rslora else r)

def delta_weight(A, B, lora_alpha, r, use_rslora=False):
    return scale(lora_alpha, r, use_rslora) * B @ A
"""


def cells(*texts):
    return [textwrap.dedent(text).strip("\n") for text in texts]


def run(*texts, name="f", key=""):
    """What `name` is after running only what it needs."""
    return run_source(extract(cells(*texts), name, key), name)


# ---------------------------------------------------------------- what an answer needs


def test_only_what_is_needed_is_taken():
    source = extract(cells(
        "import os\nimport math",
        "unrelated = os.getcwd()\nprint(1 / 0)",
        "def helper(x): return math.sqrt(x)",
        "def f(x):\n    # why this is right\n    return helper(x)",
        "f(4)\nlater = f(9)",
    ), "f")
    assert source == ("import math\n\ndef helper(x): return math.sqrt(x)\n\n"
                      "def f(x):\n    # why this is right\n    return helper(x)\n")
    assert run_source(source, "f")(4) == 2


def test_no_definition_no_text():
    assert extract(cells("x = 1", "f(3)", "import g"), "f") is None


def test_helpers_may_stand_in_any_cell_below_too():
    assert run("def f(): return helper() + k", "k = 2", "def helper(): return 3")() == 5


def test_of_two_definitions_the_later_run_wins():
    assert run("def f(): return old", "old = 1", "def f(): return g()", "def g(): return 1", "def g(): return 2")() == 2
    assert "old" not in extract(cells("old = 1", "def f(): return old", "def f(): return 2"), "f")


@pytest.mark.parametrize("change, result", [
    ("k += 1", 2), ("k = k + 1", 2), ("k: int = k + 1", 2), ("(k, j) = (k + 1, 0)", 2), ("if True: k = 2", 2),
    ("for k in range(3): pass", 2), ("with open(__import__('os').devnull) as k: k = 2", 2), ("(k := 2)", 2),
    ("try:\n    import not_there as k\nexcept ImportError:\n    k = 2", 2), ("def set_k():\n    global k\n    k = 2\nset_k()", 1),  # a call is not looked into
])
def test_a_changed_value_is_followed_through_its_changes(change, result):
    assert run("k = 1", "def f(): return k", change)() == result


def test_a_conditional_redefinition_keeps_the_one_before():
    assert run("def f(): return 1", "import sys", "if sys.version_info < (2,):\n    def f(): return 2")() == 1


@pytest.mark.parametrize("texts, result", [
    (("class f:\n    a = 1", "f.a = 2"), 2),
    (("class f:\n    a = [1]", "f.a[0] = 2"), [2]),
    (("class f:\n    a = 1", "def two(): return 2", "f.g = staticmethod(two)", "f.a = f.g()"), 2),
    (("class f:\n    a = 5", "class f(f):\n    b = 1", "class f(f):\n    c = 1"), 5),  # the notebook idiom
    (("class Base:\n    a = 7", "class f(Base): pass"), 7),
    (("class Meta(type):\n    a = 8", "class f(metaclass=Meta): pass"), 8),
    (("class f:\n    a = 1", "f.a = 2", "class f:\n    a = 3"), 3),
])
def test_classes(texts, result):
    assert run(*texts).a == result


@pytest.mark.parametrize("texts, result", [
    (("def twice(g): return lambda: 2 * g()", "@twice\ndef f(): return 3"), 6),
    (("def twice(g): return lambda: 2 * g()", "def f(): return 3", "f = twice(f)"), 6),
    (("import functools", "@functools.cache\n@functools.wraps(len)\ndef f(): return 1"), 1),
    (("default = 4", "def f(x=default): return x"), 4),
    (("default = 4", "def f(*, x=[default]): return x[0]"), 4),
    (("k = 5", "def f():\n    def inner():\n        return k\n    return inner()"), 5),
    (("k = 6", "f = lambda: (lambda: k)()"), 6),
    (("k = [1, 2]", "def f(): return sum(x * len(k) for x in k)"), 6),
    (("k = 7", "f = lambda table=[k for _ in range(2)]: sum(table)"), 14),
    (("from math import *", "def f(): return floor(pi)"), 3),
    (("T = int", "def f() -> T:\n    x: T = 3\n    return x"), 3),
    (("def f():\n    global k\n    k = 1\n    return k", "x = 0"), 1),
    (("def f(n=4): return 1 if n == 0 else n * f(n - 1)", ), 24),
    (("import os.path", "def f(): return os.path.join('a', 'b').count('a')"), 1),
])
def test_names_are_found_wherever_they_are_used(texts, result):
    assert run(*texts)() == result


def test_from_future_comes_first_and_once():
    source = extract(cells("k = 1", "from __future__ import annotations", "def f(x: not_there = k): return x"), "f")
    assert source.startswith("from __future__ import annotations\n")
    assert run_source(source, "f")() == 1


def test_two_statements_on_a_line_are_taken_apart():
    source = extract(cells("import math; 1 / 0; k = 3; print(k)", "def f(): return math.floor(k)"), "f")
    assert "1 / 0" not in source and "print" not in source and run_source(source, "f")() == 3
    assert run("if True: k = 1; j = 2", "def f(): return k + j")() == 3


def test_a_string_of_several_lines_keeps_its_lines():
    assert run('text = """\n    a\n  b\n"""', "def f(): return text")() == "\n    a\n  b\n"


@pytest.mark.parametrize("cell", [
    "!pip install nothing\ndef f(): return 1",
    "%matplotlib inline\n%timeit 1\ndef f(): return 1\n!ls",
    "import sys\nif True:\n    !pip install nothing\ndef f(): return 1",
    "files = !ls\ndef f(): return 1",
    "f?\n?f\nlen??\ndef f(): return 1",
    "%%time\ndef f(): return 1",
    "%%capture out\n%matplotlib inline\ndef f(): return 1",
    "def f():\n    return (7\n        % 3)",
    'def f():\n    """\n!not for the shell\n%nor this\n    """\n    return len(f.__doc__.split("!not")) - 1',
])
def test_lines_for_ipython_do_not_get_in_the_way(cell):
    assert run(cell)() == 1


def test_a_cell_for_another_language_is_left_out():
    assert extract(cells("%%bash\nf=1"), "f") is None
    assert extract(cells("%%writefile it.py\nf = 1"), "f") is None


def test_a_cell_that_does_not_parse_costs_only_itself():
    assert run("def f(: return 0", "k = 1", "raise ValueError('early')", "def f(): return k", "f(")() == 1


def test_statements_that_use_the_same_key_are_dropped():
    texts = cells(f"f = use('{KEY}')", "def f(): return 1", f"g = use('{KEY}')", "h = use('other.key')")
    assert extract(texts, "f", KEY) == "def f(): return 1\n"
    assert extract(texts, "g", KEY) is None
    assert extract(texts, "h", KEY) == "h = use('other.key')\n"
    # in a function that is the answer itself, the call stays: it is the learner's
    assert "use(" in extract(cells(f"def f(): return use('{KEY}')"), "f", KEY)


# ---------------------------------------------------------------- running it


def test_tracebacks_and_getsource_show_the_text():
    text = "def helper(x):\n    return 1 / x\n\nclass f:\n    '''Doc.'''\n    def go(self, x):\n        return helper(x)\n"
    f = run_source(text, "f", "your answer")
    assert inspect.getsource(f.go) == "    def go(self, x):\n        return helper(x)\n"
    assert inspect.getsource(f) == text[text.index("class f"):]
    with pytest.raises(ZeroDivisionError) as caught:
        f().go(0)
    shown = "".join(traceback.format_exception(caught.value))
    assert "your answer" in shown and "return 1 / x" in shown


def test_each_run_is_a_module_of_its_own():
    a, b = run_source("k = []\ndef f(): return k", "f"), run_source("k = []\ndef f(): return k", "f")
    a().append(1)
    assert b() == []


# ---------------------------------------------------------------- use


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_TEACH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """notebook(text) → delta_weight, from a module of this text."""

    def run(text):
        module, path = types.ModuleType("mine"), tmp_path / "mine.py"
        path.write_text(text)
        monkeypatch.setitem(sys.modules, "mine", module)
        exec(compile(text, str(path), "exec"), vars(module))
        return module.delta_weight

    return run


def passed(answer):
    verdict = check(KEY, answer)
    assert verdict.passed, verdict
    return verdict


def product(layer):
    return layer(torch.ones(1, 2), torch.ones(3, 1), 4, 2).tolist()


def test_the_reference_stands_in_until_something_passes(capsys):
    got = use(KEY)
    shown = capsys.readouterr().out
    assert got is peft_teach.delta_weight and whose(got) == "the reference"
    assert shown.startswith("○ delta_weight: the reference") and "once it passes its check" in shown


def test_a_wrong_answer_does_not_travel(notebook):
    assert not check(KEY, notebook(MINE.replace("B @ A", "B @ A + 1"))).passed
    assert whose(use(KEY)) == "the reference"


def test_the_own_answer_travels_with_its_helpers(notebook, capsys):
    mine = notebook(MINE + "\ndef unrelated(): return 1\n")
    passed(mine)
    got = use(KEY)
    assert got is not mine and whose(got) == "your own" and product(got) == product(mine)
    assert capsys.readouterr().out == "✓ delta_weight: your own\n"
    assert "def scale" in inspect.getsource(inspect.getmodule(got)) and "unrelated" not in inspect.getsource(inspect.getmodule(got))


def test_the_last_version_that_passed_travels(notebook):
    passed(notebook(MINE))
    passed(notebook(MINE.replace("* B @ A", "* (B @ A)  # the second version")))
    assert not check(KEY, notebook(MINE.replace("B @ A", "B @ A + 1"))).passed
    assert "the second version" in inspect.getsource(use(KEY))


def test_text_that_no_longer_runs_gives_the_reference_and_says_why(notebook, home, capsys):
    passed(notebook("import json\n" + MINE.replace("return scale", "json.dumps(1)\n    return scale")))
    path = home / f"{KEY}.json"
    path.write_text(path.read_text().replace("import json", "import jsonn"))
    assert whose(use(KEY)) == "the reference"
    assert "no longer runs here (ModuleNotFoundError: No module named 'jsonn')" in capsys.readouterr().out


def test_what_came_from_use_is_checked_again_but_not_stored(notebook, home):
    passed(notebook(MINE))
    before = (home / f"{KEY}.json").read_text()
    got = use(KEY)
    passed(got)
    after = (home / f"{KEY}.json").read_text()
    assert "def scale" in after and before.replace('"attempts": 1', '"attempts": 2') == after


def test_the_reference_is_no_answer(home):
    class Mine(peft_teach.LoRALinear):
        pass

    for key, answer in ((KEY, peft_teach.delta_weight), (KEY, use(KEY)), ("lora_layer.LoRALinear", Mine)):
        verdict = check(key, answer)
        assert (verdict.status, verdict.score) == ("incorrect", 0) and "reference" in verdict.message
    assert not home.exists() or not list(home.glob("*.json"))


@pytest.mark.parametrize("text", [
    "delta_weight = lambda A, B, lora_alpha, r, use_rslora=False: lora_alpha / (r**0.5 if use_rslora else r) * B @ A",
    # what a decorator made stands under another name than its own, and a stub has that one
    "def made(): raise NotImplementedError\n\ndef scaled(product):\n    def made(A, B, lora_alpha, r, use_rslora=False):\n"
    "        return product(A, B) * lora_alpha / (r**0.5 if use_rslora else r)\n    return made\n\n"
    "@scaled\ndef delta_weight(A, B):\n    return B @ A",
], ids=["lambda", "decorated"])
def test_an_answer_that_has_another_name_travels_too(notebook, text):
    passed(notebook(text + "\n"))
    got = use(KEY)
    assert whose(got) == "your own" and product(got) == [[2, 2]] * 3


@pytest.mark.parametrize("key, near", [
    ("lora_layer.delta_weigth", KEY), ("lora.delta_weight", KEY), ("LoRALinear", "lora_layer.LoRALinear"), ("zzz", KEY),
])
def test_an_unknown_key_names_the_nearest(key, near):
    for function in (use, lambda key: check(key, 1)):
        with pytest.raises(KeyError, match=near):
            function(key)


# ---------------------------------------------------------------- in a real notebook


def kernel(*texts):
    """Run these cells in a fresh kernel; → what each printed or showed."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells(*texts)])
    NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
    return ["".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") + o.get("evalue", "") for o in c.outputs)
            for c in notebook.cells]


def test_written_in_one_kernel_used_in_the_next(home):
    first = kernel(
        "from peft_teach.course import check, use\nimport torch, math",
        "def scale(lora_alpha, r, use_rslora):\n    return lora_alpha / (math.sqrt(r) if use_rslora else r)",
        "%%time\nraise_early = 1 / 0",
        f"Delta = use('{KEY}')",
        "def delta_weight(A, B, lora_alpha, r, use_rslora=False):\n    return scale(lora_alpha, r, use_rslora) * B @ A  # mine",
        f"check('{KEY}', delta_weight)",
        f"Delta = use('{KEY}')",
        "def delta_weight(A, B, lora_alpha, r, use_rslora=False):\n    return 0",
        f"again = use('{KEY}'); print(again is delta_weight)",
        f"by_lambda = lambda A, B, lora_alpha, r, use_rslora=False: scale(lora_alpha, r, use_rslora) * (B @ A)\n"
        f"check('{KEY}', by_lambda)",
    )
    assert "division by zero" in first[2]
    assert "the reference" in first[3]
    assert first[5].startswith("✓")
    assert "your own" in first[6] and "changed since" not in first[6]
    assert "changed since, and has not passed" in first[8] and first[8].endswith("False\n")
    second = kernel(
        "import inspect, torch\nfrom peft_teach.course import use, whose",
        f"delta = use('{KEY}')\nprint(whose(delta), delta(torch.ones(1, 2), torch.ones(3, 1), 4, 2).tolist())",
        "print(inspect.getsource(delta))",
    )
    assert "your own [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]" in second[1]
    assert second[2].startswith("by_lambda = lambda")


@pytest.mark.parametrize("again", [0, 1, 2])
def test_a_cell_that_is_run_again_changes_nothing(again):
    """Its statements stand behind the answer then, but the answer still needs them before."""
    cells = ["import torch\nfrom torch import nn", "class Base(nn.Module):\n    width = 3", "class Layer(Base):\n    size = torch.tensor(Base.width)"]
    text = extract([*cells, cells[again]], "Layer")
    assert run_source(text, "Layer").size == 3
    if again == 0:
        assert text == extract(cells, "Layer")
