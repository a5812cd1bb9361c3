"""Try a learner's function on the cases of an exercise, and say what is wrong with it.

The function runs in a thread of its own, so that an endless loop ends in a sentence and not in a dead notebook.
"""

import copy
import ctypes
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from .compare import difference, show

OURS = str(Path(__file__).parent)
SEED = 0


@dataclass(frozen=True)
class Verdict:
    """What came out: `passed` is True, False, or None when not attempted; `text` says why; `mistake` is the name of the
    known mistake that it looks like, or None."""

    passed: bool | None
    text: str
    mistake: str | None = None


class _TimeLimit(BaseException):  # so that `except Exception` in an answer does not catch it
    pass


@dataclass
class _Outcome:
    value: object = None
    error: BaseException | None = None
    changed: str | None = None  # which argument


def judge(exercise, answer):
    """Return the `Verdict` on the function `answer` of `exercise`."""
    if not callable(answer):
        name = exercise.solution.__name__
        return Verdict(False, f"a function was asked for: hand over `{name}` itself, without brackets and arguments")
    cases = list(exercise.cases(torch.Generator().manual_seed(SEED)))
    outcomes = _within(exercise.seconds, lambda found: _try(exercise, answer, cases, found))
    if outcomes and _unwritten(outcomes[0].error):
        return Verdict(None, "not attempted")
    if len(outcomes) < len(cases):
        return Verdict(
            False, f"{_which(cases, len(outcomes))}\n  it had not returned after {exercise.seconds:g} seconds"
        )
    expected = [exercise.observe(exercise.solution, *copy.deepcopy(case.args)) for case in cases]
    for number, (outcome, right) in enumerate(zip(outcomes, expected, strict=True)):
        wrong = _complaint(exercise, outcome, right)
        if wrong:
            mistake = _looks_like(exercise, cases, outcomes, expected)
            lines = [_which(cases, number), *wrong]
            if mistake:
                lines += [f"  likely    {mistake.says}", f"  hint      {mistake.hint}"]
            return Verdict(False, "\n".join(lines), mistake and mistake.name)
    return Verdict(True, f"all {len(cases)} cases")


def _unwritten(error):
    """Whether this is a stub's own bare `raise NotImplementedError`; torch raises it too, with a message."""
    return isinstance(error, NotImplementedError) and not error.args


def _try(exercise, answer, cases, outcomes):
    for case in cases:
        outcome, args = _Outcome(), copy.deepcopy(case.args)
        try:
            outcome.value = exercise.observe(answer, *args)
        except _TimeLimit:
            return
        except BaseException as error:  # a learner's code may raise anything, SystemExit too
            outcome.error = error
        else:
            same = [
                difference(now, before, rtol=0.0, atol=0.0) is None for now, before in zip(args, case.args, strict=True)
            ]
            if not all(same):
                outcome.changed = f"argument {same.index(False) + 1}"
        outcomes.append(outcome)


def _within(seconds, work):
    """Run `work(list)` for at most so long; return the list as it is then."""
    found = []
    thread = threading.Thread(target=work, args=(found,), daemon=True)
    thread.start()
    thread.join(seconds)
    for _ in range(20):  # a bare `except:` may swallow some
        if not thread.is_alive():
            break
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TimeLimit))
        thread.join(0.05)
    return list(found)


def _complaint(exercise, outcome, expected):
    """Return lines that say what is wrong, or none."""
    if outcome.error is not None:
        return [f"  raised    {_short(outcome.error)}", f"  expected  {show(expected)}"]
    wrong = difference(outcome.value, expected, rtol=exercise.rtol, atol=exercise.atol)
    if wrong:
        if outcome.value is None:
            wrong = "it returned nothing: is there a `return`?"
        return [f"  got       {show(outcome.value)}", f"  expected  {show(expected)}", f"  that is   {wrong}"]
    if outcome.changed:
        return [f"  the values are right, but {outcome.changed} was changed in place: work on a copy"]
    return []


def _looks_like(exercise, cases, outcomes, expected):
    """Return the `Mistake` that computes the same as the answer: on all cases, or else where the answer went wrong first."""
    first = next(i for i, pair in enumerate(zip(outcomes, expected, strict=True)) if _complaint(exercise, *pair))
    partly = None
    for mistake in exercise.mistakes:
        made = []
        _try(exercise, mistake.function, cases, made)
        same = [_same(exercise, *pair) for pair in zip(outcomes, made, strict=True)]
        if all(same):
            return mistake
        if partly is None and same[first] and _complaint(exercise, made[first], expected[first]):
            partly = mistake
    return partly


def _same(exercise, outcome, made):
    if outcome.error is not None or made.error is not None:
        return type(outcome.error) is type(made.error)
    if outcome.changed != made.changed:
        return False
    try:
        return difference(outcome.value, made.value, rtol=exercise.rtol, atol=exercise.atol) is None
    except Exception:  # two answers may be of kinds that nobody thought of comparing
        return False


def _which(cases, number):
    case = cases[number]
    arguments = ", ".join(show(argument, 80) for argument in case.args)
    return f"case {number + 1} of {len(cases)}: {case.label}\n  input     {arguments}"


def _short(error):
    """Return an error of the learner's in one line, with the line of theirs that raised it, without our own stack."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(":").splitlines()[0]
    theirs = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(OURS)]
    theirs = [f for f in theirs if "site-packages" not in f.filename] or theirs
    if not theirs:
        return text
    return f"{text}, in {theirs[-1].name}, line {theirs[-1].lineno}: {(theirs[-1].line or '').strip()}"
