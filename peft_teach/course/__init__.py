"""What a chapter's cells use: exercises, their checks, and numbers that are honest."""

from peft_teach.course.checking import Verdict, check, hint, progress, solution
from peft_teach.course.exercise import Exercise, exercises
from peft_teach.course.numbers import budget, measured, predict, reveal, settings
from peft_teach.course.reading import claims, gallery, quiz
from peft_teach.course.show import show
from peft_teach.course.use import use, whose

__all__ = [
    "Exercise", "Verdict", "budget", "check", "claims", "exercises", "gallery", "hint", "measured", "predict",
    "progress", "quiz", "reveal", "settings", "show", "solution", "use", "whose",
]
