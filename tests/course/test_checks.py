"""The checks themselves: right answers pass, every planted mistake is caught and named, others too."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_teach.course import check, exercises, hint, progress, solution
from peft_teach.course.checking import judge
from peft_teach.course.child import child_subject
from peft_teach.course.exercise import find
from peft_teach.course.mistakes import mistakes
from peft_teach.course.subject import Subject

_spec = importlib.util.spec_from_file_location("correct", Path(__file__).with_name("correct.py"))
correct = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(correct)

KEYS = [e.key for e in exercises()]
MISTAKES = [m for key in KEYS for m in mistakes(key)]
CORRECT = [(key, answer) for key, answers in correct.ANSWERS.items() for answer in answers]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_TEACH_HOME", str(tmp_path))


@pytest.mark.parametrize("key", KEYS)
def test_the_reference_equals_the_real_library(key, record_property):
    exercise = find(key)
    verdict = judge(exercise, Subject.local(exercise.reference(), key))
    assert verdict.passed and verdict.score == exercise.points, str(verdict)
    record_property("checks passed by the reference", len(exercise.probes))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.key.partition('.')[2]}-{m.cause[:60]}")
def test_a_mistake_is_caught_and_named(mistake, record_property):
    exercise = find(mistake.key)
    verdict = judge(exercise, Subject.local(exercise.answer(mistake.build()), mistake.key))
    assert not verdict.passed and verdict.score < exercise.points
    assert verdict.cause == mistake.cause, str(verdict)
    assert mistake.cause in verdict.message
    record_property("mistakes caught and named", 1)


@pytest.mark.parametrize(("key", "answer"), CORRECT, ids=lambda v: getattr(v, "__name__", v))
def test_another_right_answer_passes(key, answer, record_property):
    verdict = judge(find(key), Subject.local(answer, key))
    assert verdict.passed, str(verdict)
    record_property("other right answers passed", 1)


def test_there_are_enough_of_them():
    assert len(mistakes("lora_layer.LoRALinear")) >= 25
    assert all(len(mistakes(key)) >= 4 for key in KEYS)
    assert len(correct.ANSWERS["lora_layer.LoRALinear"]) >= 6


@pytest.mark.parametrize("key", ["lora_layer.delta_weight", "lora_layer.LoRALinear"])
def test_a_child_process_gives_the_same_verdicts(key):
    """On a right answer and on a wrong one, to the last word of the message."""
    exercise = find(key)
    wrong = mistakes(key)[0]
    for source, answer in ((wrong.source(), wrong.build()), (Path(correct.__file__).read_text("utf-8") + "\ndelta_weight, LoRALinear = delta_outer, Einsum\n", None)):
        with child_subject(source, exercise.name, key) as subject:
            there = judge(exercise, subject)
        assert there.passed == (answer is None), str(there)
        if answer is not None:
            here = judge(exercise, Subject.local(answer, key))
            strip = lambda v: {k: w for k, w in v.as_dict().items() if k != "seconds"}  # noqa: E731
            assert strip(here) == strip(there)


# ---------------------------------------------------------------- wrong answers that are on no list




def _unlisted():
    class HalfScaling(correct.Base):
        def forward(self, x):
            return self.linear(x) + 0.5 * (super().forward(x) - self.linear(x))

    class TwoDropouts(correct.Base):
        def forward(self, x):
            x = nn.functional.dropout(x, self.p, self.training)
            return super().forward(x)

    class NewBase(correct.Base):
        def __init__(self, linear, *args, **kwargs):
            super().__init__(nn.Linear(linear.in_features, linear.out_features), *args, **kwargs)

    class ReluUpdate(correct.Base):
        def forward(self, x):
            return self.linear(x) if self.merged else self.linear(x) + torch.relu(super().forward(x) - self.linear(x))

    class OnlyFirstToken(correct.Base):
        def forward(self, x):
            y = super().forward(x)
            base = self.linear(x)
            return torch.cat([y[:, :1], base[:, 1:]], 1)

    class NotAModule:
        def __init__(self, linear, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False):
            self.linear = linear

    class WrongArguments(nn.Module):
        def __init__(self, linear, rank=8, alpha=16):
            super().__init__()

    class Raises(correct.Base):
        def merge(self):
            raise KeyError("oops")

    class MergeDetachesForEver(correct.Base):
        def unmerge(self):
            super().unmerge()
            self.lora_A.requires_grad_(False)

    return [HalfScaling, TwoDropouts, NewBase, ReluUpdate, OnlyFirstToken, NotAModule, WrongArguments, Raises, MergeDetachesForEver]


@pytest.mark.parametrize("answer", _unlisted(), ids=lambda a: a.__name__)
def test_a_wrong_answer_on_no_list_is_caught_with_words(answer):
    verdict = judge(find("lora_layer.LoRALinear"), Subject.local(answer, "lora_layer.LoRALinear"))
    assert not verdict.passed and len(verdict.message) > 40


def test_a_factor_on_nobodys_list_is_named():
    def delta_weight(A, B, lora_alpha, r, use_rslora=False):
        return B @ A / lora_alpha

    verdict = judge(find("lora_layer.delta_weight"), Subject.local(delta_weight))
    assert "r/lora_alpha²" in verdict.cause


# ---------------------------------------------------------------- what a learner meets


def wrong(A, B, lora_alpha, r, use_rslora=False):
    return B @ A


def test_the_symptom_first_then_the_cause():
    first, second = check("lora_layer.delta_weight", wrong), check("lora_layer.delta_weight", wrong)
    cause = "the product is not scaled by α/r"
    assert first.cause == second.cause == cause
    assert cause not in first.message and "everywhere" in first.message
    assert cause in second.message


def test_a_hint_names_the_cause_of_the_last_try():
    check("lora_layer.delta_weight", wrong)
    assert "not scaled" in str(hint("lora_layer.delta_weight"))
    assert "Hint 2" in str(hint("lora_layer.delta_weight"))
    with pytest.raises(ValueError, match="between 1 and 3"):
        hint("lora_layer.delta_weight", 4)


def test_the_solution_opens_after_two_tries():
    assert "def delta_weight" not in str(solution("lora_layer.delta_weight"))
    for _ in range(2):
        check("lora_layer.delta_weight", wrong)
    assert "def delta_weight" in str(solution("lora_layer.delta_weight"))
    assert "def add_update" in str(solution("lora_layer.add_update", give_up=True))


def test_progress_counts_points():
    check("lora_layer.delta_weight", correct.delta_outer)
    assert "2 of 27 points" in str(progress()) and "✓ delta_weight" in str(progress())


def test_the_reference_is_no_answer():
    from peft_teach import LoRALinear, delta_weight

    class Mine(LoRALinear):
        pass

    for key, answer in (("lora_layer.delta_weight", delta_weight), ("lora_layer.LoRALinear", LoRALinear), ("lora_layer.LoRALinear", Mine)):
        assert not check(key, answer).passed


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(KeyError, match="lora_layer.delta_weight"):
        check("lora_layer.delta_weigth", wrong)


def test_a_check_leaves_no_trace():
    def delta_weight(A, B, lora_alpha, r, use_rslora=False):
        torch.manual_seed(3), torch.set_default_dtype(torch.float64), torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        return B @ A * lora_alpha / (r**0.5 if use_rslora else r)

    before = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        check("lora_layer.delta_weight", delta_weight)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


def test_prints_are_folded_and_input_is_an_error(capsys):
    def delta_weight(A, B, lora_alpha, r, use_rslora=False):
        print("here I am")
        input("? ")

    verdict = check("lora_layer.delta_weight", delta_weight)
    assert capsys.readouterr().out == ""
    assert verdict.status == "error" and "input() is called" in verdict.message
    assert "here I am" in verdict._repr_html_() and "<details>" in verdict._repr_html_()


def test_a_slow_answer_is_stopped(monkeypatch):
    import time

    monkeypatch.setattr("peft_teach.course.checking.LIMIT_SECONDS", 0.05)

    class Slow(correct.Base):
        def forward(self, x):
            time.sleep(0.1)
            return super().forward(x)

    verdict = judge(find("lora_layer.LoRALinear"), Subject.local(Slow))
    assert verdict.status == "error" and "Interrupt" in verdict.message


@pytest.mark.parametrize(("answer", "told"), [
    (3, "function itself"), (None, "function itself"), (lambda A, B: 0, "signature"), (correct.Base, "function itself"),
])
def test_what_is_no_answer_at_all(answer, told):
    verdict = check("lora_layer.delta_weight", answer)
    assert verdict.status == "incorrect" and told in verdict.message


def test_numbers_of_the_wrong_kind():
    for answer in ("many", None, 6144.5, [6144], True):
        assert not check("lora_layer.parameter_count", answer).passed
    assert check("lora_layer.parameter_count", 6144.0).passed and check("lora_layer.parameter_count", torch.tensor(6144)).passed
    assert check("lora_layer.parameter_count", ...).status == "not attempted"


def test_a_half_written_class_gets_its_points():
    class Half(correct.Base):
        def merge(self):
            raise NotImplementedError("lora_layer.LoRALinear: LoRALinear.merge")

    verdict = check("lora_layer.LoRALinear", Half)
    assert verdict.status == "incorrect" and "LoRALinear.merge is still blank" in verdict.message
    assert 0 < verdict.score < verdict.max_score


def test_as_dict_is_plain_data():
    import json

    told = json.loads(json.dumps(check("lora_layer.delta_weight", wrong).as_dict()))
    assert set(told) == set("key status score max_score cause candidates message probe setting seconds".split())


def test_the_core_path_fits_into_ninety_minutes():
    core = [e for e in exercises() if e.chapter == "lora_layer" and e.importance >= 4]
    assert sum(sum(e.minutes) / 2 for e in core) <= 75  # the rest is for reading and running


def test_refused_is_fine_wrong_is_not():
    """A case that may be refused still has to be right as far as it goes."""

    class WrongOnTwoAxes(correct.Base):
        def forward(self, x):
            if x.dim() == 4:
                raise ValueError("three axes, please")
            return super().forward(x) * (2 if x.dim() == 2 else 1)

    class RefusesThem(correct.Base):
        def forward(self, x):
            if x.dim() != 3:
                raise ValueError("three axes, please")
            return super().forward(x)

    wrong = judge(find("lora_layer.LoRALinear"), Subject.local(WrongOnTwoAxes))
    fine = judge(find("lora_layer.LoRALinear"), Subject.local(RefusesThem))
    assert not wrong.passed and wrong.probe == "other leading axes"
    assert fine.passed and "refused" in fine.message


@pytest.mark.parametrize("mode", ["inference", "meta"])
def test_a_check_does_not_hang_on_the_modes_around_it(mode):
    if mode == "inference":
        with torch.inference_mode():
            assert check("lora_layer.delta_weight", correct.delta_scale_A).passed
        return
    torch.set_default_device("meta")
    try:
        assert check("lora_layer.LoRALinear", correct.UniformInit).passed
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
