"""Whether two answers are the same, and how they are shown when they are not."""

import math
import numbers

import torch


def difference(got, expected, *, rtol, atol):
    """Return what is wrong with `got` in one sentence, or None when it is `expected`.

    Tensors have to agree in dtype, shape and values (floats within rtol and atol, NaN equals NaN), sequences in length and
    in each element, dicts in their keys; a tensor of one element may stand for a number, and a list for a tuple.
    """
    if isinstance(expected, torch.Tensor):
        return _tensors(got, expected, rtol, atol)
    if isinstance(expected, bool | str) or expected is None:
        return None if isinstance(got, type(expected)) and got == expected else "it is another value"
    if isinstance(expected, numbers.Number):
        return _numbers(got, expected, rtol, atol)
    if isinstance(expected, dict):
        if not isinstance(got, dict) or got.keys() != expected.keys():
            return f"a dict with the keys {sorted(map(str, expected))} was asked for"
        return _first(((f"under {key!r}", got[key], each) for key, each in expected.items()), rtol, atol)
    if not isinstance(got, list | tuple) or len(got) != len(expected):
        name = type(got).__name__
        kind = f"a {name} of {len(got)}" if isinstance(got, list | tuple) else f"of type {name}"
        return f"{len(expected)} values were asked for, in a tuple; this is {kind}"
    pairs = zip(got, expected, strict=True)
    return _first(((f"value {i} of {len(expected)}", *pair) for i, pair in enumerate(pairs, 1)), rtol, atol)


def show(value, limit=160):
    """Return `value` as short text: tensors with dtype and shape, long ones cut."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().flatten()
        numbers_ = ", ".join(_number(v) for v in flat[:8].tolist()) + (", …" if flat.numel() > 8 else "")
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} {tuple(value.shape)} [{numbers_}]"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple):
        inside = ", ".join(show(each, 60) for each in value[:8]) + (", …" if len(value) > 8 else "")
        inside += "," if isinstance(value, tuple) and len(value) == 1 else ""
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {show(each, 60)}" for key, each in list(value.items())[:8]) + "}"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _number(value):
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _tensors(got, expected, rtol, atol):
    if not isinstance(got, torch.Tensor):
        return f"a tensor was asked for, this is of type {type(got).__name__}"
    if got.shape != expected.shape:
        return f"its shape is {tuple(got.shape)}, not {tuple(expected.shape)}"
    if got.dtype != expected.dtype:
        return f"its dtype is {got.dtype}, not {expected.dtype}"
    if not torch.is_floating_point(expected):
        wrong = got != expected
    else:
        wrong = ~torch.isclose(got.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return None
    if expected.dim() == 0:
        return "it is another value"
    place = tuple(wrong.nonzero()[0].tolist())
    pair = f"{show(got[place].item())}, not {show(expected[place].item())}"
    return f"{int(wrong.sum())} of {wrong.numel()} values differ; at {list(place)} {pair}"


def _numbers(got, expected, rtol, atol):
    if isinstance(got, torch.Tensor) and got.numel() == 1:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, numbers.Number):
        return f"a number was asked for, this is of type {type(got).__name__}"
    if isinstance(expected, int):
        if not isinstance(got, numbers.Integral):
            return "an integer was asked for" if got == expected else f"it is {show(got)}, not {show(expected)}"
        return None if got == expected else f"it is {show(got)}, not {show(expected)}"
    same = (math.isnan(got) and math.isnan(expected)) or math.isclose(got, expected, rel_tol=rtol, abs_tol=atol)
    if same:
        return None
    if show(got) == show(expected):
        return f"it is off by {abs(got - expected):.1g}"
    return f"it is {show(got)}, not {show(expected)}"


def _first(triples, rtol, atol):
    for where, got, expected in triples:
        wrong = difference(got, expected, rtol=rtol, atol=atol)
        if wrong:
            return f"{where}: {wrong}"
    return None
