"""From an answer to its blank: what is kept, what goes, and that a check sees it as untouched."""

import importlib
import inspect
import textwrap

import pytest

from peft_teach.course import check, exercises
from peft_teach.course.blank import blank, bodies, definition
from peft_teach.course.subject import Subject
from peft_teach.course.use import run_source

KEY = "book.it"


def text(source):
    return textwrap.dedent(source).lstrip("\n")


def blanked(source):
    return blank(text(source), KEY)


def test_what_is_kept_and_what_goes():
    assert blanked('''
        class it(nn.Module):
            """What it is."""

            kind = "lora"  # an attribute
            lora_A = property(lambda self: self.down.weight)

            @torch.no_grad()
            @other(3)
            def merge(
                self, x: Float[Tensor, "batch seq"], *, r: int = 8,
            ) -> None:
                """Says what.

                In two paragraphs.
                """
                # α/r, or α/√r?
                y = secret(x)
                if y:
                    return secret

            @property
            def merged(self) -> bool:
                return self.secret is not None

            def extra_repr(self):  # given
                return "kept"

            def also_kept(self):
                # given
                return "kept"

            def __init__(self): secret()
    ''') == text('''
        class it(nn.Module):
            """What it is."""

            kind = "lora"  # an attribute
            lora_A = property(lambda self: self.down.weight)

            @torch.no_grad()
            @other(3)
            def merge(
                self, x: Float[Tensor, "batch seq"], *, r: int = 8,
            ) -> None:
                """Says what.

                In two paragraphs.
                """
                # α/r, or α/√r?
                raise NotImplementedError("book.it: it.merge")

            @property
            def merged(self) -> bool:
                raise NotImplementedError("book.it: it.merged")

            def extra_repr(self):  # given
                return "kept"

            def also_kept(self):
                # given
                return "kept"

            def __init__(self):
                raise NotImplementedError("book.it: it.__init__")
    ''')


@pytest.mark.parametrize("source, expected", [
    ("def it(a):\n    return a\n", 'def it(a):\n    raise NotImplementedError("book.it: it")\n'),
    ("def it(a: 'α' = 'β') -> int: return a\n", "def it(a: 'α' = 'β') -> int:\n    raise NotImplementedError(\"book.it: it\")\n"),
    ("def it(\n    a,\n): return a\n", 'def it(\n    a,\n):\n    raise NotImplementedError("book.it: it")\n'),
    ('def it(a):\n    """Only words."""\n', 'def it(a):\n    """Only words."""\n    raise NotImplementedError("book.it: it")\n'),
    ("def it(a):\n    @cache\n    def inner(): return a\n    return inner\n", 'def it(a):\n    raise NotImplementedError("book.it: it")\n'),
    ("import math\n\ndef it(a):\n    return a\n\ndef more(a):\n    return a\n",
     'import math\n\ndef it(a):\n    raise NotImplementedError("book.it: it")\n\ndef more(a):\n    raise NotImplementedError("book.it: more")\n'),
])
def test_functions(source, expected):
    assert blank(source, KEY) == expected


@pytest.mark.parametrize("source, expected", [
    ("it = 3 * 4  # because\n", "it = ...\n"),
    ("it = r * (\n    576 + 192\n)\n", "it = ...\n"),
    ("it = (1, 2)\n", "it = (..., ...)\n"),
    ('it = {\n    "A zero": ("B", "both"),\n    \'α "quoted"\': 3, 1: 2, None: 3, (1, 2): 4,\n}\n',
     'it = {\n    "A zero": (..., ...),\n    "α \\"quoted\\"": ...,\n    1: ...,\n    None: ...,\n    (1, 2): ...,\n}\n'),
    ('it = {"a": {"b": 1}}\n', None),
    ("s = settings('k')  # given\nit = s.r\n", "s = settings('k')  # given\nit = ...\n"),
])
def test_values(source, expected):
    got = blank(source, KEY)
    assert expected is None or got == expected
    compile(got, "", "exec")


def test_a_blank_is_seen_as_blank_whatever_it_was():
    for source in ("def it(a): return a", 'it = {"a": {"b": 1}, "c": (1, 2)}', "class it:\n    def f(self): return 1\n    def g(self): return 1"):
        seen = Subject.local(run_source(blank(source, KEY), "it"), KEY).describe()
        assert seen["blank"]


def test_bodies_are_those_to_write():
    found = bodies(text("""
        k = 1
        def it(a): return a
        def told(a): return a  # given
        class Layer:
            def forward(self): return 1
            def extra_repr(self): return ""  # given
    """))
    assert [where for where, _ in found] == ["it", "Layer.forward"]


def test_definition():
    source = text('''
        # of the constant
        K = 3

        # of something else

        # of it,
        # in two lines
        @decorated
        @twice(
            3
        )
        def it(a):
            return a

        class Layer:
            def it(self):
                pass

        A, B = 1, 2
    ''')
    assert definition(source, "K") == "# of the constant\nK = 3\n"
    assert definition(source, "it") == "# of it,\n# in two lines\n@decorated\n@twice(\n    3\n)\ndef it(a):\n    return a\n"
    assert definition(source, "Layer") == "class Layer:\n    def it(self):\n        pass\n"
    with pytest.raises(LookupError, match="no top-level definition of merge"):
        definition(source, "merge")


@pytest.mark.parametrize("exercise", exercises(), ids=lambda e: e.key)
def test_the_blank_of_every_exercise_is_not_attempted(exercise):
    if exercise.kind == "answer":
        answer = run_source(blank(f"{exercise.name} = {exercise.reference()!r}", exercise.key), exercise.name)
    else:
        module = inspect.getsource(importlib.import_module(exercise.module))
        source, emptied = exercise.source(), blank(exercise.source(), exercise.key)
        assert module.count(source) == 1 and emptied != source
        for line in emptied.splitlines():
            assert "raise NotImplementedError" in line or line in source
        answer = run_source(module.replace(source, emptied), exercise.name)
    verdict = check(exercise.key, answer)
    assert (verdict.status, verdict.score, verdict.cause) == ("not attempted", 0, None)
