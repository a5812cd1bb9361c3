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
        raise ValueError(f"guess a number{f' in {unit}' if unit else ''}, for example 1; this is {guess!r}")
    return f"you said: {_show(guess, unit)}, {said}{_how_far(guess, measured)}"


def _how_far(guess, measured):
    if math.isnan(measured):
        return ""
    if guess == measured:
        return ": exactly"
    direction = "too high" if guess > measured else "too low"
    if guess * measured <= 0 or math.isinf(measured):
        return f": {direction}"
    ratio = max(guess / measured, measured / guess)
    if ratio >= 1.5:
        return f": {ratio:{',.0f' if ratio >= 10 else '.2g'}} times {direction}"
    off = abs(guess / measured - 1)
    return f": {off:.0%} {direction}" if off >= 0.005 else ": as good as exact"


def _order(guess, measured, unit):
    measured = {str(label): value for label, value in measured.items()}
    order = sorted(measured, key=measured.get)
    said = "measured: " + " < ".join(f"{label} ({_show(measured[label], unit)})" for label in order)
    if guess is None:
        return f"{said}   ({NO_GUESS})"
    if not isinstance(guess, list | tuple) or sorted(map(str, guess)) != sorted(order):
        raise ValueError(f"guess an order of {list(measured)}, the smallest first; this is {guess!r}")
    pairs = list(itertools.combinations(map(str, guess), 2))
    right = sum(measured[a] <= measured[b] for a, b in pairs)
    return f"you said: {' < '.join(map(str, guess))}\n{said}\n{right} of {len(pairs)} pairs in the right order"


def _show(value, unit):
    space = "" if unit in ("", "×", "%") else " "
    whole = isinstance(value, numbers.Integral) or abs(value) >= 1000
    return f"{value:{',.0f' if whole else '.4g'}}{space}{unit}"
