"""What stands beside the exercises: the trap gallery, quiz questions, and the claims that are answered."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import textwrap
from importlib import resources

from peft_teach.course.checking import judge
from peft_teach.course.exercise import find
from peft_teach.course.mistakes import Mistake, mistakes
from peft_teach.course.show import Card
from peft_teach.course.subject import Subject

VERDICTS = ("shown", "contradicted", "only if", "no difference that we could see", "can't be tested at this scale")


def gallery(*keys: str) -> Card:
    """Wrong answers to these exercises, each run just now: how one comes to it, and what shows it."""
    folded = []
    for key in keys:
        exercise = find(key)
        for mistake in mistakes(key):
            if mistake.why:
                verdict = judge(exercise, Subject.local(exercise.answer(mistake.build()), key))
                found = dict(line for line in verdict.lines if isinstance(line, tuple))
                wrong = _change(mistake)
                number = found.get("furthest off") or f"{found.get('yours', found.get('raised', '?'))}, expected {found.get('expected', 'no error')}"
                text = (f"{wrong}\n\nhow one comes to it   {mistake.why}\nwhat it breaks        {mistake.breaks}\n"
                        f"what shows it         {mistake.shows}\njust measured         {found.get('looked at')}: {number}")
                folded.append((f"{len(folded) + 1}. {mistake.cause}", text))
    return Card(f"Trap gallery: {len(folded)} wrong answers", ["Guess what would show each before you open it."], folded)


def _change(mistake: Mistake) -> str:
    """The lines of the module that differ, as a small diff."""
    right = inspect.getsource(importlib.import_module(find(mistake.key).module))
    lines = difflib.unified_diff(right.splitlines(), mistake.source().splitlines(), n=0, lineterm="")
    changed = [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]
    return "\n".join(sign + " " + text for sign, text in zip((c[0] for c in changed), textwrap.dedent("\n".join(c[1:] for c in changed)).split("\n")))


@functools.cache
def _read(name: str) -> dict:
    import yaml

    return yaml.safe_load((resources.files("peft_teach.course") / name).read_text("utf-8"))


def quiz(key: str, choice: str | None = None) -> Card:
    """A question; with a choice, whether it is right, and why. KeyError for an unknown question."""
    questions = _read("quizzes.yml")
    if key not in questions:
        raise KeyError(f"there is no question {key!r}; there is: {', '.join(questions)}")
    asked = questions[key]
    choices = asked["choices"]
    if choice is None:
        lines = [(letter, c["text"]) for letter, c in choices.items()]
        return Card(f"○ {asked['question']}", lines + [f'Answer with quiz("{key}", "a")'])
    choice = str(choice).lower()
    if choice not in choices:
        raise ValueError(f"choice must be one of {', '.join(choices)}, got {choice!r}")
    right = choice == asked["right"]
    return Card(f"{'✓' if right else '✗'} {choice}: {choices[choice]['text']}", [choices[choice]["why"]])


def claims(chapter: str | None = None) -> Card:
    """What people are usually told, and what this book's cells say to it; of one chapter or of all."""
    rows = [(name, c) for name, c in _read("claims.yml").items() if chapter in (None, c["chapter"])]
    if not rows:
        raise KeyError(f"no claims of {chapter!r}; there is: {', '.join(sorted({c['chapter'] for c in _read('claims.yml').values()}))}")
    lines = [(name, f"“{c['claim']}”  {c['verdict'].upper()}{': ' + c['condition'] if c.get('condition') else ''}\n{c['answer']}")
             for name, c in rows]
    return Card(f"{len(rows)} claims", lines)
