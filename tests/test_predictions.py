"""Predictions: what was guessed beside what was measured, for numbers and for orders."""

import math

import pytest
import torch

from course_utils.exercises import reveal
from course_utils.exercises.predictions import NO_GUESS


def printed(capsys, guess, measured, **options):
    assert reveal(guess, measured, **options) is None
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize(
    "guess, measured, text",
    [
        (20, 5, "4 times too high"),
        (5, 20, "4 times too low"),
        (1, 1234, "1,234 times too low"),
        (1, 26, "26 times too low"),
        (100, 1, "100 times too high"),
        (1.6, 1.0, "1.6 times too high"),
        (12, 10, "20% too high"),
        (9, 10, "10% too low"),
        (10.04, 10, "as good as exact"),
        (10, 10, "exactly"),
        (10.0, 10, "exactly"),
        (0, 0, "exactly"),
        (0, 3, "too low"),
        (3, 0, "too high"),
        (-1, 2, "too low"),
        (2, -1, "too high"),
        (-4, -2, "2 times too low"),
        (-2, -4, "2 times too high"),
        (3, math.inf, "too low"),
        (3, -math.inf, "too high"),
    ],
)
def test_how_far_a_guess_was(capsys, guess, measured, text):
    line = printed(capsys, guess, measured)
    assert line.startswith("you said: ") and line.rpartition(": ")[2] == text


@pytest.mark.parametrize(
    "measured, unit, text",
    [
        (3.98123, "×", "3.981×"),
        (93.5, "%", "93.5%"),
        (26.94, "ms", "26.94 ms"),
        (0.00012, "s", "0.00012 s"),
        (44_775_880, "bytes", "44,775,880 bytes"),
        (44_775_880.4, "bytes", "44,775,880 bytes"),
        (1234.5, "", "1,234"),
        (-1234.5, "", "-1,234"),
        (7, "", "7"),
        (math.inf, "dB", "inf dB"),
        (math.nan, "nats", "nan nats"),
        (torch.tensor(2.5), "dB", "2.5 dB"),
    ],
)
def test_numbers_and_units(capsys, measured, unit, text):
    assert printed(capsys, None, measured, unit=unit) == f"measured: {text}   ({NO_GUESS})"
    assert f"measured: {text}" in printed(capsys, 1, measured, unit=unit)


def test_nothing_is_far_from_what_is_no_number(capsys):
    assert printed(capsys, 2, math.nan) == "you said: 2, measured: nan"


@pytest.mark.parametrize("guess", ["3", True, [3], math.nan, math.inf, 1j, {"a": 1}])
def test_a_guess_that_is_no_number(guess):
    with pytest.raises(ValueError, match="guess a number in MB, for example 1; this is "):
        reveal(guess, 11.3, unit="MB")
    with pytest.raises(ValueError, match="guess a number, for example 1; this is "):
        reveal(guess, math.inf)


MEASURED = {"FP16": 104.2, "INT8": 5.9, "FP32": 26.9}


def test_no_order_yet(capsys):
    expected = f"measured: INT8 (5.9 ms) < FP32 (26.9 ms) < FP16 (104.2 ms)   ({NO_GUESS})"
    assert printed(capsys, None, MEASURED, unit="ms") == expected


@pytest.mark.parametrize(
    "guess, right",
    [
        (["INT8", "FP32", "FP16"], 3),
        (("INT8", "FP16", "FP32"), 2),
        (["FP16", "INT8", "FP32"], 1),
        (["FP16", "FP32", "INT8"], 0),
    ],
)
def test_pairs_in_the_right_order(capsys, guess, right):
    first, second, last = printed(capsys, guess, MEASURED).splitlines()
    assert first == "you said: " + " < ".join(guess)
    assert second == "measured: INT8 (5.9) < FP32 (26.9) < FP16 (104.2)"
    assert last == f"{right} of 3 pairs in the right order"


def test_equal_ones_may_come_in_either_order(capsys):
    for guess in (["a", "b"], ["b", "a"]):
        assert printed(capsys, guess, {"a": 1, "b": 1}).endswith("1 of 1 pairs in the right order")


def test_labels_need_not_be_text(capsys):
    measured = {8: 0.94, 4: 0.9, None: 0.1}
    assert printed(capsys, [None, 4, 8], measured).endswith("3 of 3 pairs in the right order")
    assert printed(capsys, ["None", "4", "8"], measured).endswith("3 of 3 pairs in the right order")


@pytest.mark.parametrize("guess", [["INT8", "FP32"], ["INT8", "INT8", "FP32"], ["INT8", "FP32", "BF16"], "INT8", 3, {}])
def test_an_order_has_to_hold_every_label_once(guess):
    with pytest.raises(ValueError, match=r"guess an order of \['FP16', 'INT8', 'FP32'\], the smallest first; this is "):
        reveal(guess, MEASURED)
