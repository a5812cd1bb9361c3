"""Commit to a guess first, then see it beside the measurement."""

import itertools
import math
import numbers

NO_GUESS = "no guess yet: write one above, and run again from there"


def reveal(guess, measured, *, unit=""):
    """Print what was measured beside what the learner had guessed; returns nothing.

    measured: a number in `unit`; then `guess` is one too. Or a dict of label → number; then `guess` is a list of all its
    labels, the smallest first. guess: None, when the learner made none. Raises `ValueError` for a guess that does not fit.
    """
    print(_order(guess, measured, unit) if isinstance(measured, dict) else _number(guess, measured, unit))


def _number(guess, measured, unit):
    said = f"measured: {_show(measured, unit)}"
    if guess is None:
        return f"{said}   ({NO_GUESS})"
    if isinstance(guess, bool) or not isinstance(guess, numbers.Real) or not math.isfinite(guess):
        raise ValueError(
            f"guess a number{f' in {unit}' if unit else ''}, for example {measured * 0 + 1:g}; this is {guess!r}"
        )
    return f"you said: {_show(guess, unit)}, {said}: {_how_far(guess, measured)}"


def _how_far(guess, measured):
    if guess == measured:
        return "exactly"
    direction = "too high" if guess > measured else "too low"
    if guess * measured <= 0:
        return direction
    ratio = max(guess / measured, measured / guess)
    return f"{ratio:.2g} times {direction}" if ratio >= 1.5 else f"{abs(guess / measured - 1):.0%} {direction}"


def _order(guess, measured, unit):
    order = sorted(measured, key=measured.get)
    said = "measured: " + " < ".join(f"{label} ({_show(measured[label], unit)})" for label in order)
    if guess is None:
        return f"{said}   ({NO_GUESS})"
    if not isinstance(guess, list | tuple) or sorted(map(str, guess)) != sorted(map(str, order)):
        raise ValueError(f"guess an order of {list(measured)}, the smallest first; this is {guess!r}")
    pairs = list(itertools.combinations(guess, 2))
    right = sum(measured[a] <= measured[b] for a, b in pairs)
    return f"you said: {' < '.join(map(str, guess))}\n{said}\n{right} of {len(pairs)} pairs in the right order"


def _show(value, unit):
    space = "" if unit in ("", "×", "%") else " "
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f"{text}{space}{unit}"
