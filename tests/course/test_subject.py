"""The object under check, in this process and in a child: the same messages, the same answers."""

import math
import os
import textwrap

import pytest
import torch
from torch import nn

from peft_teach.course import codec
from peft_teach.course.child import child_subject
from peft_teach.course.codec import CodecError, LinearSpec, Opaque, Remote
from peft_teach.course.subject import Instance, OutOfTime, Subject, SubjectError
from peft_teach.course.use import run_source

KEY = "book.it"


@pytest.fixture(scope="module")
def child():
    """One process for all tests that leave it alive: starting one takes two seconds."""
    with child_subject("it = 0", "it", KEY) as subject:
        yield subject


@pytest.fixture(params=["local", "child"])
def load(request):
    """load(source) → the Subject of `it` as the source defines it; every test runs on both sides."""

    def local(source):
        return Subject.local(run_source(textwrap.dedent(source), "it"), KEY)

    def in_child(source):
        channel = request.getfixturevalue("child").channel
        channel.printed.clear()
        channel.request("load", source=textwrap.dedent(source), name="it", key=KEY)
        return Subject(channel)

    return local if request.param == "local" else in_child


def raises(type, message=""):
    return pytest.raises(SubjectError, match=f"^{type}: .*{message}")


LAYER = """
    import torch
    from torch import nn

    class it(nn.Module):
        step_size = 3

        def __init__(self, linear, r=2, noisy=False):
            super().__init__()
            self.linear = linear.requires_grad_(False)
            self.out_features, self.in_features = linear.weight.shape
            self.lora_A = nn.Parameter(torch.randn(r, self.in_features))
            self.pair = nn.Parameter(torch.ones(self.in_features, self.out_features))
            self.drop = nn.Dropout(0.5 if noisy else 0.0)
            self._secret = torch.ones(2)

        view = property(lambda self: self.pair.T)
        top = property(lambda self: self.pair[:2])
        copy = property(lambda self: self.pair.T.contiguous())

        def forward(self, x):
            return self.drop(self.linear(x) + x @ self.view.T)

        def double_(self, by=2):
            self.lora_A.data *= by
            return self.lora_A.shape
"""


def layer_of(subject, **kwargs):
    torch.manual_seed(3)
    return subject.build(LinearSpec(torch.randn(5, 4), torch.randn(5)), **kwargs)


# ---------------------------------------------------------------- describe


def test_describe_a_class(load):
    seen = load("""
        class it:
            def __init__(self, linear, r=8, *, lora_alpha): raise NotImplementedError("book.it: it.__init__")
            def merge(self, *args, **kwargs):
                \"\"\"A docstring does not make it written.\"\"\"
                raise NotImplementedError("book.it: it.merge")
            def written(self): return 3
            @property
            def merged(self): raise NotImplementedError("book.it: it.merged")
            @staticmethod
            def helper(): raise NotImplementedError("another.key: it.helper")
    """).describe()
    assert seen["type"] == "class"
    assert seen["blank"] == ["__init__", "merge", "merged"]
    assert [(p["name"], p["required"]) for p in seen["parameters"]] == [("linear", True), ("r", False), ("lora_alpha", True)]
    assert {"merge", "merged", "written", "helper"} <= set(seen["names"]) and "__init__" not in seen["names"]


@pytest.mark.parametrize("body, blank", [
    ('raise NotImplementedError("book.it: it")', ["it"]),
    ('"""Says what."""\n    raise NotImplementedError("book.it: it")', ["it"]),
    ("return a", []),
    ("...", []),
    ('b = a + 1\n    raise NotImplementedError("book.it: it")', []),
    ('raise NotImplementedError("something else")', []),
])
def test_a_function_is_blank_only_while_it_is_the_stub(load, body, blank):
    seen = load(f"def it(a, *args, b=1, **more):\n    {body}\n").describe()
    assert (seen["type"], seen["blank"]) == ("function", blank)
    assert [(p["name"], p["required"], p["open"]) for p in seen["parameters"]] == [
        ("a", True, False), ("args", False, False), ("b", False, False), ("more", False, True)]


def test_a_blank_behind_a_decorator_is_still_blank(load):
    assert load("""
        import torch
        @torch.no_grad()
        def it(a): raise NotImplementedError("book.it: it")
    """).describe()["blank"] == ["it"]


@pytest.mark.parametrize("value, blank", [
    ("...", True), ('{"a": (..., ...), "b": ...}', True), ('{"a": (..., 1)}', False), ("0", False), ("None", False), ("{}", False), ("()", False),
])
def test_a_value_is_blank_only_while_all_of_it_is_dots(load, value, blank):
    seen = load(f"it = {value}").describe()
    assert seen["type"] == "value" and bool(seen["blank"]) is blank


@pytest.mark.parametrize("value, expected", [
    ("12", 12), ('{"a": (1, None)}', {"a": (1, None)}), ("[1e300, float('inf')]", [1e300, math.inf]), ("...", Opaque("ellipsis")),
    ("[object(), 2]", [Opaque("object"), 2]),
])
def test_value(load, value, expected):
    assert load(f"it = {value}").value() == expected


# ---------------------------------------------------------------- functions


def test_call_with_plain_data_and_tensors(load):
    subject = load("def it(a, b=2, *, scale=1.0): return {'sum': (a + b) * scale, 'args': [a, b]}")
    assert subject.call(1, 4, scale=0.5) == {"sum": 2.5, "args": [1, 4]}
    assert torch.equal(subject.call(torch.ones(2))["sum"], torch.full((2,), 3.0))


def test_gradients_of_the_arguments(load):
    subject = load("def it(a, b, c, n): return (a * b).half() * n")
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)
    done = subject.call_all(a, b, torch.ones(2), 2, grad_output=torch.tensor([1.0, 10.0]))
    assert done["value"].tolist() == [6, 16] and done["value"].dtype == torch.float16
    assert done["grads"][0].tolist() == [6, 80] and done["grads"][1].tolist() == [2, 40]
    assert done["grads"][2:] == [None, None]
    assert a.grad is None  # the gradient is that of a copy


def test_a_gradient_of_what_is_no_tensor(load):
    with raises("TypeError", "expected a tensor, got int"):
        load("def it(a): return 3").call_all(torch.ones(1), grad_output=torch.ones(1))


def test_changes_in_place_are_told_and_do_not_reach_the_check(load):
    subject = load("""
        import torch
        def it(A, rows):
            with torch.no_grad(): A.fill_(7)
            rows.append(A.shape)
    """)
    A, rows = torch.zeros(2, 3, requires_grad=True), []
    done = subject.call_all(A, rows)
    assert done["value"] is None
    assert done["args"][0].tolist() == [[7.0] * 3] * 2 and done["args"][1] == [(2, 3)]
    assert A.sum() == 0 and rows == []


def test_results_that_can_not_cross_stand_as_their_type(load):
    got = load("def it(): return [1, object(), (i for i in ()), {1: 2}, print]").call()
    assert got == [1, Opaque("object"), Opaque("generator"), Opaque("dict"), Opaque("builtin_function_or_method")]


@pytest.mark.parametrize("too_much", ["endless", "torch.zeros(1000)"])
def test_a_result_that_is_too_much_is_an_error_and_the_next_call_works(load, too_much, monkeypatch):
    monkeypatch.setattr(codec, "MAX_BYTES", codec.MAX_BYTES)  # put back at the end
    subject = load(f"""
        import torch
        from peft_teach.course import codec
        endless = []
        endless.append(endless)
        def it(n):
            codec.MAX_BYTES = 2000 if n == 0 else 2**28
            return n or {too_much}
    """)
    with raises("CodecError", "above the limit|deep"):
        subject.call(0)
    assert subject.call(5) == 5


# ---------------------------------------------------------------- objects


def test_build_call_get(load):
    layer = layer_of(load(LAYER), r=3)
    x = torch.randn(2, 4)
    assert tuple(layer.get("lora_A").shape) == (3, 4)
    assert layer.get("step_size") == 3 and layer.get("linear.bias").shape == (5,)
    assert layer.get("linear") == Opaque("Linear")
    expected = x @ layer.get("linear.weight").T + layer.get("linear.bias") + x.sum(1, keepdim=True)
    torch.testing.assert_close(layer(x), expected)
    assert layer.method("double_", by=3) == (3, 4)
    with raises("AttributeError", "nothing"):
        layer.get("nothing")


def test_two_objects_are_two(load):
    subject = load(LAYER)
    a, b = layer_of(subject), layer_of(subject)
    a.put("lora_A", torch.zeros(2, 4))
    assert a.get("lora_A").sum() == 0 and b.get("lora_A").abs().sum() > 0


def test_put_writes_into_the_object_and_get_gives_a_copy(load):
    layer = layer_of(load(LAYER))
    layer.put("lora_A", torch.full((2, 4), 5.0))
    copy = layer.get("lora_A")
    copy.data.zero_()
    assert (layer.get("lora_A") == 5).all()
    layer.put("linear.weight", torch.zeros(5, 4))
    assert (layer.get("linear.weight") == 0).all()
    layer.put("view", torch.arange(20.0).reshape(5, 4))  # a transposed view of the parameter
    assert torch.equal(layer.get("pair"), torch.arange(20.0).reshape(5, 4).T)


def test_put_refuses_what_it_can_not_write(load):
    layer = layer_of(load(LAYER))
    with raises("TypeError", "return the parameter itself, not a copy"):
        layer.put("copy", torch.zeros(5, 4))
    with raises("ValueError", r"lora_A has shape \(2, 4\), not \(4, 2\)"):
        layer.put("lora_A", torch.zeros(4, 2))
    with raises("TypeError", "step_size is a int"):
        layer.put("step_size", torch.zeros(1))


def test_private_names_are_refused(load):
    layer = layer_of(load(LAYER))
    for refused in (
        lambda: layer.get("_secret"), lambda: layer.get("linear._parameters"), lambda: layer.get("__class__"),
        lambda: layer.put("_secret", torch.zeros(2)), lambda: layer.grad("_secret"), lambda: layer.trainable("_modules"),
        lambda: layer.method("__reduce__"), lambda: layer.method("_get_name"),
    ):
        with raises("AttributeError", "not for others to read"):
            refused()


def test_grad_trainable_and_zero_grad(load):
    layer = layer_of(load(LAYER))
    assert layer.trainable() == 2 * 4 + 4 * 5 and layer.trainable("linear") == 0
    x = torch.randn(3, 4)
    assert layer.grad("pair") is None
    layer.call_all(x, grad_output=torch.ones(3, 5))
    expected = x.sum(0)[:, None].expand(4, 5)
    torch.testing.assert_close(layer.grad("pair"), expected)
    torch.testing.assert_close(layer.grad("view"), expected.T)  # of a property that shows it transposed
    torch.testing.assert_close(layer.grad("top"), expected[:2])  # or in part
    assert layer.grad("lora_A") is None and layer.grad("linear.weight") is None
    layer.zero_grad()
    assert layer.grad("pair") is None or layer.grad("pair").abs().sum() == 0


def test_modes(load):
    subject = load(LAYER)
    subject.seed(0)
    layer = layer_of(subject, noisy=True).train()
    x = torch.randn(50, 4)
    assert (layer(x) == 0).double().mean() > 0.3
    assert layer.get("training") is True
    assert (layer.eval()(x) != 0).all() and layer.get("training") is False


def test_to_another_dtype(load):
    layer = layer_of(load(LAYER)).to(torch.float64)
    assert layer.get("lora_A").dtype == torch.float64 and layer(torch.ones(1, 4).double()).dtype == torch.float64


def test_optimizer_steps(load):
    layer = layer_of(load(LAYER))
    x, gy = torch.randn(3, 4), torch.randn(3, 5)
    mine = nn.Parameter(layer.get("pair").detach())
    theirs, own = layer.optimizer("AdamW", lr=0.1), torch.optim.AdamW([mine], lr=0.1)
    before = layer.get("linear.weight")
    for _ in range(3):
        layer.zero_grad()
        layer.call_all(x, grad_output=gy)
        theirs()
        own.zero_grad()
        (x @ mine).backward(gy)
        own.step()
    torch.testing.assert_close(layer.get("pair"), mine, rtol=1e-5, atol=1e-6)
    assert not torch.equal(mine, torch.ones(4, 5)) and torch.equal(layer.get("linear.weight"), before)


def test_the_same_seed_gives_the_same_numbers_here_and_there(load):
    subject = load("import torch\ndef it(n): return torch.randn(n), torch.rand(n), torch.randperm(n)")
    subject.seed(11)
    got = subject.call(5)
    torch.manual_seed(11)
    for value, expected in zip(got, (torch.randn(5), torch.rand(5), torch.randperm(5))):
        assert torch.equal(value, expected)


# ---------------------------------------------------------------- errors, prints, warnings, ends


def test_an_error_comes_with_type_message_and_the_learners_own_line(load):
    subject = load("""
        import torch
        def helper(x):
            return torch.nn.functional.linear(x, torch.ones(2, 3))
        def it(x):
            return helper(x)
    """)
    with raises("RuntimeError", "") as caught:
        subject.call(torch.ones(4))
    error = caught.value
    assert error.where.startswith("line 4 of helper:") and "functional.linear" in error.where
    assert "return helper(x)" in error.trace and "RuntimeError" in error.trace and "subject.py" not in error.trace


def test_the_line_named_is_never_one_of_a_library(load):
    subject = load("""
        import json
        import torch
        def it(which):
            if which: return json.loads("{")
            return torch.nn.Linear(3, 2)(torch.ones(4))
    """)
    for which, line in ((1, 5), (0, 6)):
        with pytest.raises(SubjectError) as caught:
            subject.call(which)
        assert caught.value.where.startswith(f"line {line} of it")


def test_an_error_whose_message_is_an_error(load):
    with raises("Mine", "can't be shown"):
        load("""
            class Mine(Exception):
                def __str__(self): raise ValueError
            def it(): raise Mine
        """).call()


def test_after_an_error_the_subject_goes_on(load):
    subject = load("def it(n): return 1 / n")
    with raises("ZeroDivisionError", "division by zero"):
        subject.call(0)
    assert subject.call(4) == 0.25


def test_leaving_is_an_error_like_others(load):
    subject = load("import sys\ndef it(n): return n if n else sys.exit('enough')")
    with raises("SystemExit", "enough"):
        subject.call(0)
    assert subject.call(1) == 1


def test_prints_are_caught_on_both_streams(load, capfd):
    subject = load("""
        import sys
        def it():
            print("hello", 3)
            print("oh", file=sys.stderr)
            return 1
    """)
    assert subject.call() == 1
    assert subject.channel.printed == ["hello 3\noh\n"]
    assert capfd.readouterr().out == ""


def test_a_flood_of_prints_is_cut(load):
    subject = load("def it(): print('x' * 10**6)")
    subject.call()
    assert 100 < len("".join(subject.channel.printed)) <= 2000


def test_input_raises_instead_of_waiting(load):
    with raises("RuntimeError", r"input\(\) is called"):
        load("def it(): return input('name? ')").call()
    assert load("it = 4").value() == 4


def test_warnings_are_told(load):
    subject = load("""
        import warnings
        def it(n):
            if n: warnings.warn(f"r = {n} is large")
            warnings.warn("an old name", DeprecationWarning)
    """)
    for n in (9, 8):  # not only the first time
        subject.call(n)
        assert subject.channel.warnings == [f"r = {n} is large"]
    subject.call(0)
    assert subject.channel.warnings == []


def test_the_deadline_ends_a_check_between_operations(load):
    subject = load("def it(): return 1")
    subject.channel.deadline = 0.0
    try:
        with pytest.raises(OutOfTime):
            subject.call()
    finally:
        subject.channel.deadline = None
    assert subject.call() == 1


# ---------------------------------------------------------------- a learner's test gets a stand-in


class Counter(nn.Module):
    """What the stand-in stands for."""

    def __init__(self):
        super().__init__()
        self.lora_B = nn.Parameter(torch.ones(2, 3))
        self._secret = 1

    def forward(self, x):
        return x @ self.lora_B.T

    def merge(self, times=1):
        self.lora_B.data += times
        return "merged"

    def fail(self):
        raise ValueError("it can't be merged")

    def other(self):
        return "not named to the learner"


def stand_in_for(subject, *args):
    counter = Counter()
    return counter, subject.call(Remote(counter, ("merge", "fail")), *args)


def test_a_stand_in_is_called_read_and_written(load):
    subject = load("""
        import torch
        def it(layer, x):
            before = layer(x)
            layer.put("lora_B", torch.full((2, 3), 4.0))
            said = layer.merge(times=2)
            layer.train().eval()
            return before, layer(x), layer.get("lora_B"), said, layer.trainable()
    """)
    counter, (before, after, B, said, trainable) = stand_in_for(subject, torch.ones(1, 3))
    assert before.tolist() == [[3, 3]] and after.tolist() == [[18, 18]] and (B == 6).all()
    assert (said, trainable) == ("merged", 6)
    assert (counter.lora_B == 6).all() and not counter.training


def test_a_stand_in_gives_copies_only(load):
    counter, got = stand_in_for(load("""
        def it(layer):
            copy = layer.get("lora_B")
            copy.data.zero_()
            return layer.get("lora_B").sum()
    """))
    assert got == 6 and counter.lora_B.sum() == 6


@pytest.mark.parametrize("access", [
    "layer.lora_B", "layer.lora_B.data.zero_()", "layer.other()", "layer.parameters()", "layer.lora_B = x", "layer.training = False",
])
def test_any_other_access_says_what_there_is(load, access):
    with raises("AttributeError", r".*no \.\w+.*\.get\(…\), \.put\(…\).*\.merge\(…\), \.fail\(…\).*layer\.get\(") as caught:
        stand_in_for(load(f"def it(layer, x):\n    {access}"), torch.zeros(2, 3))
    assert caught.value.where.startswith("line 2 of it")


def test_the_errors_of_a_stand_in_reach_the_learners_test(load):
    counter, got = stand_in_for(load("""
        def it(layer):
            try:
                layer.fail()
            except Exception as error:
                return str(error)
    """))
    assert got == "ValueError: it can't be merged"
    with raises("SubjectError", "ValueError: it can't be merged"):
        stand_in_for(load("def it(layer): layer.fail()"))
    with raises("SubjectError", "AttributeError: .* not for others"):
        stand_in_for(load("def it(layer): return layer.get('_secret')"))


def test_two_stand_ins_are_kept_apart(load):
    subject = load("def it(a, b):\n    a.merge()\n    return a.get('lora_B').sum() - b.get('lora_B').sum()")
    assert subject.call(Remote(Counter(), ("merge",)), Remote(Counter(), ("merge",))) == 6


def test_an_oracle_is_given_the_object_itself():
    counter = Counter()
    assert Subject.local(lambda layer: int(layer is counter), oracle=True).call(Remote(counter)) == 1
    assert Subject.local(lambda layer: type(layer).__name__).call(Remote(counter)) == Instance.__name__


# ---------------------------------------------------------------- code that spoils its own process


def test_code_that_does_not_run_says_so():
    with raises("ZeroDivisionError") as caught:
        with child_subject("x = 1\nit = x / 0\n", "it", KEY):
            pass
    assert caught.value.where == "line 2 of <module>: it = x / 0"
    with raises("NameError", "don't define it"):
        with child_subject("x = 1\n", "it", KEY):
            pass
    with raises("SyntaxError"):
        with child_subject("def it(:\n", "it", KEY):
            pass


def test_a_process_that_ends_is_an_error_now_and_later():
    with child_subject("import os\ndef it(): os._exit(3)", "it", KEY) as subject:
        for _ in range(2):
            with raises("ProcessEnded", "status 3"):
                subject.call()


def test_writing_to_stdout_and_reading_stdin_do_no_harm():
    source = """
        import os, subprocess, sys
        def it(n):
            os.write(1, b"straight to the descriptor")
            print("around the capture", file=sys.__stdout__, flush=True)
            subprocess.run([sys.executable, "-c", "import sys; print(sys.stdin.read())"])
            return [sys.stdin.read(), sys.__stdin__.read(), os.read(0, 100) == b"", n]
    """
    with child_subject(textwrap.dedent(source), "it", KEY) as subject:
        for n in range(2):
            assert subject.call(n) == ["", "", True, n]


def test_no_process_is_left_behind():
    with child_subject("import os\ndef it(): return os.getpid()", "it", KEY) as subject:
        pid = subject.call()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_a_check_sends_has_to_be_able_to_cross(load):
    with pytest.raises(CodecError, match="can't cross"):
        load("def it(a): return a").call(object())
