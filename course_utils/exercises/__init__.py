"""What people do: exercises that answer back, quizzes, predictions, and a record of what is done.

    check("zero-point", my_function)   hint("zero-point")   solution("zero-point")   quiz("01")   progress()

An exercise is a function to write. It is described in the file of its notebook (`precision.py`, `ptq.py`, ...) by a tested
solution, the inputs to try, and the mistakes that people make, each written out as a function: an answer that computes the
same made the same mistake.
"""

import difflib
import functools
import importlib

from . import progress as _progress
from . import quizzes as _quizzes
from .checking import judge
from .exercise import Case, Exercise, Mistake
from .predictions import reveal

__all__ = [
    "Case",
    "Exercise",
    "Mistake",
    "check",
    "export",
    "get",
    "hint",
    "progress",
    "quiz",
    "reset",
    "reveal",
    "solution",
]

MODULES = {"01": "precision", "02": "ptq", "03": "qat", "04": "benchmarking", "05": "int4", "06": "deployment"}
_hints_given = {}


class Result:
    """What `check` returns: `passed` is True, False, or None when not attempted; `mistake` names a known mistake, or None."""

    def __init__(self, id, verdict):
        self.id, self.passed, self.mistake = id, verdict.passed, verdict.mistake

    def __repr__(self):
        return f"Result({self.id!r}, passed={self.passed})"

    def _ipython_display_(self):
        """Nothing: the verdict was printed, and a cell that ends with `check(...)` need not say it twice."""


@functools.cache
def every():
    """Return all exercises as a dict of id → `Exercise`, in the order of the course."""
    modules = [importlib.import_module(f".{name}", __package__) for name in MODULES.values()]
    return {exercise.id: exercise for module in modules for exercise in module.EXERCISES}


def get(id):
    """Return the `Exercise` of that id. Raises `ValueError` for an unknown one."""
    if id in every():
        return every()[id]
    near = difflib.get_close_matches(str(id), every(), n=1)
    raise ValueError(
        f"there is no exercise {id!r}" + (f"; did you mean {near[0]!r}?" if near else f": see {list(every())}")
    )


def check(id, answer):
    """Try the function `answer` on the inputs of exercise `id`, print the verdict, and return a `Result`.

    Says what was asked and what came, which known mistake it looks like, and one hint. Never raises what the answer raises,
    and never waits longer than the exercise allows. Raises `ValueError` for an unknown id.
    """
    exercise = get(id)
    verdict = judge(exercise, answer)
    if verdict.passed is None:
        print(f"○ {exercise.title}: not attempted. Write the function, run the cell again; hint({id!r}) helps.")
        return Result(id, verdict)
    trouble = _progress.note(id, verdict.passed)
    sign = "✔" if verdict.passed else "✘"
    print(f"{sign} {exercise.title}: {verdict.text}")
    if trouble:
        print(trouble)
    return Result(id, verdict)


def hint(id):
    """Print the next hint of exercise `id`; they rise, and start again after the last."""
    hints = get(id).hints
    number = _hints_given.get(id, 0) % len(hints)
    _hints_given[id] = number + 1
    print(f"hint {number + 1} of {len(hints)}: {hints[number]}")


def solution(id):
    """Print the tested solution of exercise `id`."""
    print(get(id).source().rstrip())


def quiz(id, answer=None):
    """Show the quiz of a notebook (`quiz("01")`) or one question (`quiz("01.3")`), or answer one: `quiz("01.3", "b")`.

    Returns what a notebook displays, or prints the verdict on an answer. Raises `ValueError` for an unknown id or letter.
    """
    question = _quizzes.question(id)
    chosen = (question,) if question else _quizzes.questions(id)
    if not chosen:
        raise ValueError(f"there is no quiz {id!r}: a notebook's is quiz('01'), one question of it quiz('01.1')")
    if answer is None:
        return _quizzes.Quiz(chosen)
    if question is None:
        raise ValueError(f"an answer belongs to one question, as in quiz('{id}.1', {answer!r})")
    option = question.option(answer)
    trouble = _progress.note(id, option.right)
    print(f"{'✔ right' if option.right else '✘ no'}: {option.why}")
    if trouble:
        print(trouble)
    return None


def progress():
    """Print what is solved, attempted and left, with minutes."""
    rows = _rows()
    left = sum(row["minutes"] for row in rows if row["kind"] == "exercise" and row["status"] != _progress.SOLVED)
    for notebook in sorted({row["notebook"] for row in rows}):
        here = [row for row in rows if row["notebook"] == notebook]
        asked = [row for row in here if row["kind"] == "question"]
        right = sum(row["status"] == _progress.SOLVED for row in asked)
        print(f"{notebook}  quiz: {right} of {len(asked)} right")
        for row in here:
            if row["kind"] == "exercise":
                print(f"    {row['status']:10}{row['minutes']:4} min  {row['title']}  ({row['id']})")
    solved = sum(row["status"] == _progress.SOLVED for row in rows if row["kind"] == "exercise")
    total = sum(row["kind"] == "exercise" for row in rows)
    print(f"{solved} of {total} exercises solved, {left} minutes left")


def export(path, *, name):
    """Write your progress to `path` as CSV, a line an exercise and question, with your `name` in each: for a class."""
    _progress.export(path, [{"name": name} | row for row in _rows()])


def reset():
    """Forget all progress."""
    _progress.reset()
    _hints_given.clear()


def _rows():
    done = _progress.read()
    rows = [("question", q.id, q.id.split(".")[0], q.text, 1) for q in _quizzes.every()]
    rows += [("exercise", e.id, e.notebook, e.title, e.minutes) for e in every().values()]
    return [
        {
            "kind": kind,
            "notebook": notebook,
            "id": id,
            "title": title,
            "minutes": minutes,
            "status": done.get(id, {}).get("status", "left"),
            "tries": done.get(id, {}).get("tries", 0),
            "when": done.get(id, {}).get("when", ""),
        }
        for kind, id, notebook, title, minutes in rows
    ]
