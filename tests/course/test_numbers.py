"""Numbers and figures in a chapter: measured, predicted, set, and shown with words."""

import math
import sys

import matplotlib
import numpy
import pytest
import torch

from peft_teach.course import budget, measured, numbers, predict, reveal, settings, show
from peft_teach.course.exercise import find

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_TEACH_HOME", str(tmp_path))
    monkeypatch.delenv("PEFT_TEACH_BUDGET", raising=False)
    monkeypatch.setattr(numbers, "_predictions", {})


# ---------------------------------------------------------------- measured


@pytest.mark.parametrize("value", [1.5, 2, 2.5, torch.tensor(2.0), torch.tensor([2.0], requires_grad=True), numpy.float32(2)])
def test_a_measured_number_in_its_range_is_printed(value, capsys):
    assert measured("time of a step", value, expect=2.0, tol=0.25, unit="s") is None  # a last line shows nothing more
    assert capsys.readouterr().out == f"time of a step ≈ {float(getattr(value, 'detach', lambda: value)()):.4g} s\n"


@pytest.mark.parametrize("value", [1.49, 2.51, -2, math.nan, math.inf, torch.tensor(math.nan)])
def test_a_measured_number_out_of_its_range_raises(value, monkeypatch):
    with pytest.raises(AssertionError, match="between 1.5 and 2.5"):
        measured("time", value, expect=2.0, tol=0.25)
    monkeypatch.setenv("PEFT_TEACH_BUDGET", "tiny")  # only the way is tried
    measured("time", value, expect=2.0, tol=0.25)


def test_a_measured_number_may_be_negative():
    measured("gap", -2.2, expect=-2.0, tol=0.25)
    with pytest.raises(AssertionError, match="between -2.5 and -1.5"):
        measured("gap", 2.0, expect=-2.0, tol=0.25)


def test_budget(monkeypatch):
    assert budget(600, 6) == 600
    monkeypatch.setenv("PEFT_TEACH_BUDGET", "tiny")
    assert budget(600, 6) == 6


# ---------------------------------------------------------------- settings


def test_settings_are_those_of_the_exercise_and_a_copy():
    s = settings("lora_layer.parameter_count")
    assert (s.in_features, s["out_features"], s.r) == (576, 192, 8)
    assert repr(s) == "in_features = 576\nout_features = 192\nr = 8"
    s["r"] = 9
    assert find("lora_layer.parameter_count").settings["r"] == 8
    with pytest.raises(AttributeError, match="no setting 'rank'; there is: in_features, out_features, r"):
        s.rank
    with pytest.raises(KeyError, match="parameter_count"):
        settings("lora_layer.parameter_counts")


# ---------------------------------------------------------------- predict and reveal


def test_no_prediction_yet():
    assert predict("book.share").text().startswith("○ book.share: no prediction yet")
    assert reveal("book.share", 3).text() == "○ book.share: it is 3\n  You made no prediction."


@pytest.mark.parametrize("guess, actual", [
    (3, 3), (0.1 + 0.2, 0.3), (1, 1.0), ("both", "both"), (False, False), (0, 0),
    ({"a": ("B", "both")}, {"a": ("B", "both")}), ({"a": [0.1 + 0.2]}, {"a": [0.3]}),
])
def test_a_right_prediction(guess, actual):
    predict("book.it", guess)
    assert reveal("book.it", actual).text() == f"✓ book.it: as you predicted, {actual!r}"


@pytest.mark.parametrize("guess, actual", [
    (3, 4), (3, "3"), ("A", "both"), ((1, 2), (1, 2, 3)), ({"a": 1}, {"b": 1}), ({"a": 1}, {"a": 1, "b": 2}), (0, 1e-3), (1.0, math.nan),
])
def test_a_wrong_prediction_shows_both(guess, actual):
    predict("book.it", guess)
    assert reveal("book.it", actual).text() == f"✗ book.it: not as predicted\n  predicted  {guess!r}\n  it is      {actual!r}"


def test_a_prediction_outlives_the_kernel(monkeypatch):
    predict("book.it", 3)
    predict("book.it", 0)  # a second thought counts
    monkeypatch.setattr(numbers, "_predictions", {})
    assert reveal("book.it", 0).text().startswith("✓")


# ---------------------------------------------------------------- show


def labelled(axes):
    axes.plot([0, 1], [1, 3])
    axes.set(xlabel="step", ylabel="loss")
    return axes.figure


def test_a_figure_is_shown_with_its_fact_and_closed(capsys):
    fig = labelled(plt.subplots()[1])
    show(fig, alt="The loss rises.", fact="from 1 to 3")
    assert capsys.readouterr().out == "from 1 to 3\n"
    assert fig.number not in plt.get_fignums()


def test_in_a_notebook_the_alt_text_goes_with_the_picture(monkeypatch):
    sent = []
    monkeypatch.setattr(sys.modules["peft_teach.course.show"], "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: sent.append((args, kwargs)))
    show(labelled(plt.subplots()[1]), alt="The loss rises.", fact="from 1 to 3")
    (((data,), kwargs),) = sent
    assert data["image/png"].startswith(b"\x89PNG") and data["text/plain"] == "Figure: The loss rises."
    assert kwargs["metadata"] == {"image/png": {"alt": "The loss rises."}}


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_figure_without_alt_text_is_refused(alt):
    with pytest.raises(ValueError, match="alt"):
        show(labelled(plt.subplots()[1]), alt=alt, fact="1")


@pytest.mark.parametrize("missing", ["xlabel", "ylabel"])
def test_a_figure_with_an_axis_without_a_label_is_refused(missing):
    fig, (first, second) = plt.subplots(1, 2)
    labelled(first)
    labelled(second).axes[1].set(**{missing: ""}, title="the second")
    with pytest.raises(ValueError, match="'the second' need a label"):
        show(fig, alt="Two lines.", fact="1")


def test_axes_that_need_no_label_of_their_own(capsys):
    fig, axes = plt.subplots(1, 2, sharey=True)
    for ax in axes:
        labelled(ax)
    axes[1].set_ylabel("")  # shared, and its numbers are not drawn
    image = axes[0].imshow([[1, 2], [3, 4]])
    fig.colorbar(image, label="|error|")  # has one direction only
    twin = axes[1].twinx()
    twin.plot([0, 1], [9, 8])
    twin.set_ylabel("memory (MiB)")
    fig.add_subplot(3, 3, 9).axis("off")
    show(fig, alt="A picture, two lines.", fact="1")

    fig, axes = plt.subplots()
    fig.colorbar(labelled(axes).axes[0].imshow([[1, 2]]))  # a bar of what?
    with pytest.raises(ValueError, match="need a label"):
        show(fig, alt="A picture.", fact="1")
