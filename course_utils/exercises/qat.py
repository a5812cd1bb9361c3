"""Exercises of notebook 03: gradients through rounding, batch norms that fit, a control, a step that learns."""

import torch

from .exercise import Case, Exercise, Mistake


def _with_gradients(function, *args):
    """Return what `function` returns and, where that is not None, the gradients of its tensors `x` and `scale`, in a dict.

    What comes back to the result is 1, 2, 3, …, so that a backward pass which ignores it shows.
    """
    with torch.enable_grad():
        given = [arg.requires_grad_() for arg in args if isinstance(arg, torch.Tensor)]
        value = function(*args)
        if value is None:
            return None
        found = [None] * len(given)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            incoming = torch.arange(1.0, value.numel() + 1).reshape(value.shape).to(value.dtype)
            found = torch.autograd.grad(value, given, incoming, allow_unused=True)
            value = value.detach()
    return {"value": value} | dict(zip(("x.grad", "scale.grad"), found, strict=False))


def round_straight_through(x, scale):
    """Return `x` (float32, any shape) rounded to the nearest multiple of `scale` (a positive float), half to even.

    Backward it shall look as if nothing had been rounded: the gradient that comes back to the result goes on to `x` as it
    is. The check sends 1, 2, 3, … back, one number for each value.
    """
    rounded = torch.round(x / scale) * scale
    return x + (rounded - x).detach()


def _straight_cases(generator):
    yield Case("steps of one quarter", (torch.tensor([0.26, -0.74, 0.51]), 0.25))
    yield Case("halfway between two steps", (torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75]), 0.5))
    yield Case("small steps, two dimensions", (torch.randn(3, 4, generator=generator), 0.03))
    yield Case("steps wider than one", (torch.randn(8, generator=generator) * 9, 3.0))
    yield Case("everything rounds to zero", (torch.full((4,), -0.1), 1.0))
    yield Case("a single number", (torch.tensor(0.3), 0.25))
    yield Case("not contiguous", (torch.randn(5, 2, generator=generator).T, 0.2))
    yield Case("empty", (torch.empty(0, 3), 0.1))


def fake_quantize_straight_through(x, scale, zero_point, qmin, qmax):
    """Return `x` (float32, any shape) to integers and back: q = round(x / scale) + zero_point, saturated, and back to floats.

    The integers are qmin .. qmax, both included; round half to even. Backward, what comes back goes on to `x` unchanged where
    q, before it is saturated, is one of these integers; everywhere else `x` gets 0. The check sends 1, 2, 3, … back.
    """
    q = torch.round(x / scale) + zero_point
    value = (q.clamp(qmin, qmax) - zero_point) * scale
    learns = x * ((q >= qmin) & (q <= qmax))
    return learns + (value - learns).detach()


def _masked(x, scale, zero_point, qmin, qmax, *, mask="right", straight=True, saturates=True):
    ratio = x / scale
    q = torch.round(ratio) + zero_point
    value = (q.clamp(qmin, qmax) - zero_point) * scale
    if not straight:
        return value
    compared = {"unrounded": ratio + zero_point, "without zero point": torch.round(ratio)}.get(mask, q)
    inside = (compared > qmin) & (compared < qmax) if mask == "open" else (compared >= qmin) & (compared <= qmax)
    value = value if saturates else value * inside
    learns = x if mask is None else x * inside
    return learns + (value - learns).detach()


def _mask_alone(*args):
    result = _masked(*args)
    result.register_hook(torch.ones_like)
    return result


def _mask_cases(generator):
    x = torch.tensor([-1.1, -0.3, 0.0, 0.4, 0.9])
    yield Case("inside the range", (x, 0.01, 128, 0, 255))
    yield Case("below and above the range", (torch.tensor([-3.0, -1.7, 0.4, 1.2, 2.6]), 1.0, 0, -2, 1))
    yield Case("just beyond the ends, but rounded to them", (torch.tensor([-2.4, 1.4, 0.2]), 1.0, 0, -2, 1))
    yield Case("halfway between two integers", (torch.tensor([-2.5, -1.5, 0.5, 1.5]) * 0.25, 0.25, 0, -2, 1))
    yield Case("weights, eight bits", (torch.randn(4, 3, generator=generator), 0.01, 0, -128, 127))
    yield Case("activations behind a ReLU", (torch.tensor([-0.2, 0.0, 3.0, 7.4, 9.0]), 0.5, 0, 0, 15))
    yield Case("everything clipped", (torch.tensor([40.0, -50.0, 1e6]), 0.1, 100, 0, 255))
    yield Case("not contiguous", (torch.randn(6, 2, generator=generator).T, 0.3, 8, 0, 15))
    yield Case("empty", (torch.empty(0), 0.1, 0, -8, 7))


def reestimate(batches):
    """Return `(mean, var)`, float32 of shape (channels,): what a batch norm takes over from `batches`, each counting alike.

    batches: a list of float32 activations (images, channels, ...), with any number of further dimensions and perhaps fewer
    images in the last. Take of each batch and channel, over all images and positions, the mean and the unbiased variance
    (divided by their number less one); return the plain averages of those over the batches.
    """
    channels = [batch.transpose(0, 1).flatten(1) for batch in batches]
    mean = torch.stack([values.mean(1) for values in channels]).mean(0)
    var = torch.stack([values.var(1) for values in channels]).mean(0)
    return mean, var


def _statistics(batches, *, unbiased=True, positions=True, root=False, by_size=False):
    if not positions:
        batches = [batch.flatten(2).mean(2) if batch.dim() > 2 else batch for batch in batches]
    channels = [batch.transpose(0, 1).flatten(1) for batch in batches]
    shares = torch.tensor([values.shape[1] if by_size else 1.0 for values in channels])
    shares = (shares / shares.sum())[:, None]
    mean = (torch.stack([values.mean(1) for values in channels]) * shares).sum(0)
    var = (torch.stack([values.var(1, unbiased=unbiased) for values in channels]) * shares).sum(0)
    return mean, var.sqrt() if root else var


def _moving(batches, momentum=0.1):
    mean, var = torch.zeros(batches[0].shape[1]), torch.ones(batches[0].shape[1])
    for batch in batches:
        new_mean, new_var = _statistics([batch])
        mean, var = torch.lerp(mean, new_mean, momentum), torch.lerp(var, new_var, momentum)
    return mean, var


def _statistics_cases(generator):
    def batch(*shape, mean=0.0, std=1.0):
        return torch.randn(shape, generator=generator) * std + mean

    yield Case("a linear layer, two batches", ([batch(6, 3), batch(6, 3, mean=1.0)],))
    yield Case("a convolution, three batches", ([batch(2, 4, 3, 3, mean=m, std=2.0) for m in (-1.0, 0.0, 3.0)],))
    yield Case("a smaller last batch", ([batch(8, 2, 2, 2), batch(8, 2, 2, 2), batch(3, 2, 2, 2, mean=5.0)],))
    yield Case("sequences: three dimensions", ([batch(2, 3, 5, mean=0.5), batch(2, 3, 5, std=0.1)],))
    yield Case("one batch", ([batch(4, 3, mean=2.0, std=3.0)],))
    yield Case("two images, one channel", ([batch(2, 1), batch(2, 1), batch(2, 1)],))
    yield Case("as many images as channels", ([batch(3, 3, 2, 2), batch(3, 3, 2, 2)],))
    yield Case("a channel that never changes", ([torch.ones(4, 2) * torch.tensor([0.0, 7.0]) for _ in range(2)],))
    yield Case("channels last in memory", ([batch(2, 3, 3, 2).to(memory_format=torch.channels_last)],))


def qat_minus_control(control, qat, labels, z=1.96):
    """Return `(difference, low, high)`, floats: the accuracy of QAT minus that of its control, and ± z · √variance around it.

    control, qat: predicted classes, int64 (seeds, images); the same row was trained with the same seed. labels: int64 (images,).
    Every prediction gives 1, 0 or -1: right by QAT minus right by the control. variance: that of the images' means over the
    seeds, divided by the number of images, plus that of the seeds' means over the images, divided by the number of seeds;
    both unbiased. There are at least two seeds and two images.
    """
    table = (qat == labels).double() - (control == labels).double()
    seeds, images = table.shape
    variance = table.mean(0).var() / images + table.mean(1).var() / seeds
    mean, half = float(table.mean()), z * float(variance) ** 0.5
    return mean, mean - half, mean + half


def _variance(table, *, of_images=True, of_seeds=True, unbiased=True, spread=False):
    seeds, images = (1, 1) if spread else table.shape
    images_part = table.mean(0).var(unbiased=unbiased) / images if of_images else 0.0
    return images_part + (table.mean(1).var(unbiased=unbiased) / seeds if of_seeds else 0.0)


def _verdict(control, qat, labels, z=1.96, *, sign=1, variance=_variance, apart=False, **options):
    trained, other = (qat == labels).double(), (control == labels).double()
    table = sign * (trained - other)
    found = variance(trained) + variance(other) if apart else variance(table, **options)
    mean, half = float(table.mean()), z * float(found) ** 0.5
    return mean, mean - half, mean + half


def _control_cases(generator):
    def predictions(seeds, images, *accuracies):
        """Return labels, and predictions of so many seeds for each accuracy: images that are hard are hard for all."""
        labels = torch.randint(0, 10, (images,), generator=generator)
        hard = torch.rand(images, generator=generator)
        noise = [torch.randn(seeds, images, generator=generator) / 5 for _ in accuracies]
        right = [hard + each < accuracy for each, accuracy in zip(noise, accuracies, strict=True)]
        return labels, *(torch.where(each, labels, (labels + 1) % 10) for each in right)

    for label, seeds, images, *accuracies in (
        ("three seeds: QAT is a little behind", 3, 200, 0.9, 0.87),
        ("QAT is ahead", 3, 200, 0.7, 0.9),
        ("five seeds, few images", 5, 12, 0.8, 0.8),
        ("two seeds, two images", 2, 2, 0.3, 0.9),
    ):
        labels, control, qat = predictions(seeds, images, *accuracies)
        yield Case(label, (control, qat, labels, 1.96))
    labels, control, qat = predictions(4, 50, 0.6, 0.9)
    yield Case("both the same", (control, control, labels, 1.96))
    yield Case("not contiguous", (control.T.contiguous().T[::2], qat.T.contiguous().T[::2], labels, 1.96))
    qat[0] = (labels + 3) % 10
    yield Case("one seed went wrong; 99 % interval", (control, qat, labels, 2.576))


def learned_step(x, scale, qmin, qmax):
    """Return `x` (float32, any shape, not empty) as round(clamp(x / scale, qmin, qmax)) · scale, half to even; backward, LSQ.

    scale: a positive float32 tensor of shape (). qmin <= 0 < qmax: ints; no x / scale is exactly one of these two. g is what
    comes back; the check sends 1, 2, 3, … `x` gets g where qmin < x / scale < qmax, and 0 elsewhere. `scale` gets the sum of
    g · slope over all values, times 1 / √(count · qmax), where count is how many values `x` has; slope is
    round(x / scale) - x / scale inside the range, qmin below it and qmax above it.
    """
    factor = (x.numel() * qmax) ** -0.5
    scale = scale.detach() + factor * (scale - scale.detach())  # the same value, a smaller gradient
    ratio = (x / scale).clamp(qmin, qmax)
    return (ratio + (torch.round(ratio) - ratio).detach()) * scale


def _lsq(count, qmax):
    return (count * qmax) ** -0.5


def _step(x, scale, qmin, qmax, *, factor=_lsq, x_too=False, fixed=False, clipped=True, straight=True):
    small = factor(x.numel(), qmax)
    s = scale if x_too else scale.detach() + small * (scale - scale.detach())
    ratio = (x / (s.detach() if fixed else s)).clamp(qmin, qmax)
    q = torch.round(ratio)
    value = ((ratio + (q - ratio).detach()) if straight else q) * s
    if not clipped:
        value = torch.where((x / scale >= qmin) & (x / scale <= qmax), value, value.detach())
    return value.detach() + small * (value - value.detach()) if x_too else value


def _step_cases(generator):
    def normal(*shape):
        return torch.randn(shape, generator=generator)

    yield Case("inside and outside", (torch.tensor([-3.1, -1.7, 0.4, 1.2, 2.6]), torch.tensor(0.5), -4, 3))
    yield Case("weights, four bits", (normal(4, 5), torch.tensor(0.2), -8, 7))
    yield Case("activations behind a ReLU", (normal(3, 4).relu() + 0.01, torch.tensor(0.11), 0, 15))
    yield Case("everything inside, eight bits", (normal(6), torch.tensor(0.04), -128, 127))
    yield Case("everything clipped", (torch.tensor([9.3, -8.1, 7.7]), torch.tensor(0.1), -4, 3))
    yield Case("two bits, where qmax is 1", (normal(10), torch.tensor(0.9), -2, 1))
    yield Case("a single value", (torch.tensor([0.7]), torch.tensor(0.3), -8, 7))
    yield Case("an outlier", (torch.cat([normal(6), torch.tensor([900.3])]), torch.tensor(0.3), -8, 7))
    yield Case("not contiguous", (normal(5, 3).T, torch.tensor(0.25), -4, 3))


EXERCISES = (
    Exercise(
        id="straight-through",
        title="Rounding with a gradient",
        notebook="03",
        minutes=5,
        difficulty="easy",
        objective="round in the forward pass, and let the gradient through in the backward pass",
        solution=round_straight_through,
        cases=_straight_cases,
        observe=_with_gradients,
        mistakes=(
            Mistake(
                "cut off from its input",
                lambda x, scale: (torch.round(x / scale) * scale).detach(),
                "the value is right, but nothing leads back to `x` any more: it has no gradient at all",
                "look at what `detach()` stands around: only part of the result may be a constant",
            ),
            Mistake(
                "plain rounding",
                lambda x, scale: torch.round(x / scale) * scale,
                "the value is right, but `torch.round` has a gradient of zero everywhere, and no weight would ever move",
                "write the result as `x` plus something, and make the something a constant for autograd",
            ),
            Mistake(
                "gradient with the wrong sign",
                lambda x, scale: x.detach() + (torch.round(x / scale) * scale - x),
                "the value is right, but the wrong part of the sum is the constant, and the gradient comes out negative",
                "one `x` stays for autograd to see: which of the two?",
            ),
            Mistake(
                "error added instead of taken away",
                lambda x, scale: x + (x - torch.round(x / scale) * scale).detach(),
                "the rounding error has the wrong sign: the result is as far from `x` as the grid is, on the other side",
                "work out on paper what has to be added to 0.26 to arrive at 0.25",
            ),
            Mistake(
                "gradient times the scale",
                lambda x, scale: (x + (torch.round(x / scale) - x).detach()) * scale,
                "the value is right, but the last multiplication is outside the estimator, so the gradient shrinks with `scale`",
                "compare what the constant part takes `x` to with what it should take it to",
            ),
            Mistake(
                "stays an integer",
                lambda x, scale: x / scale + (torch.round(x / scale) - x / scale).detach(),
                "the results are the integers, not the multiples of `scale` that they stand for",
                "each integer is worth one `scale`",
            ),
            Mistake(
                "truncates instead of rounding",
                lambda x, scale: x + (torch.trunc(x / scale) * scale - x).detach(),
                "the gradient is right, but x / scale was cut off instead of rounded",
                "-0.74 is nearer to -0.75 than to -0.5",
            ),
        ),
        hints=(
            "start with the rounded value, as if there were no gradient to think of",
            "`t.detach()` has the value of `t` and counts as a constant: its gradient is zero",
            "the result is `x` plus a constant; choose the constant so that the sum is the rounded value",
        ),
    ),
    Exercise(
        id="clip-gradient",
        title="The gradient stops at the ends",
        notebook="03",
        minutes=10,
        difficulty="medium",
        objective="fake-quantize with a gradient that knows what is clipped",
        solution=fake_quantize_straight_through,
        cases=_mask_cases,
        observe=_with_gradients,
        mistakes=(
            Mistake(
                "plain rounding",
                lambda *a: _masked(*a, straight=False),
                "the values are right, but without the straight-through estimator no gradient reaches `x` at all",
                "`torch.round` stops the gradient; the previous exercise went around it",
            ),
            Mistake(
                "no mask",
                lambda *a: _masked(*a, mask=None),
                "clipped values got a gradient too, as if a small step could bring them back into the range",
                "where q lies outside qmin .. qmax, nothing may depend on `x`",
            ),
            Mistake(
                "mask of the unrounded number",
                lambda *a: _masked(*a, mask="unrounded"),
                "what lies just beyond an end and is rounded to it was counted as clipped",
                "look at the order of the steps in the docstring: is the comparison made before or after rounding?",
            ),
            Mistake(
                "ends left out",
                lambda *a: _masked(*a, mask="open"),
                "the integers qmin and qmax themselves got no gradient, although nothing was clipped there",
                "an end belongs to its range, and what autograd makes of `clamp` just there depends on the version of torch",
            ),
            Mistake(
                "mask without the zero point",
                lambda *a: _masked(*a, mask="without zero point"),
                "the mask compares round(x / scale) with qmin and qmax, before the zero point was added",
                "it is q that saturates, so it is q that has to be compared",
            ),
            Mistake(
                "zero instead of saturated",
                lambda *a: _masked(*a, saturates=False),
                "the mask was put on the value too: what is clipped became 0 instead of the end of the range",
                "only the gradient is 0 out there",
            ),
            Mistake(
                "ignores what comes back",
                _mask_alone,
                "the backward pass returns the mask itself: what comes back from the layers above is lost",
                "by the chain rule a backward pass multiplies what it is handed",
            ),
        ),
        hints=(
            "compute q and the value first; the gradient is a second question, and needs a mask of zeros and ones",
            "`x` times the mask has the right gradient; its value does not matter, for you can replace it",
            "a + (value - a).detach() has the value of `value` and the gradient of `a`",
        ),
    ),
    Exercise(
        id="batch-norm-statistics",
        title="Batch norms, estimated anew",
        notebook="03",
        minutes=10,
        difficulty="medium",
        objective="give batch norms the statistics of the rounded network, the cheapest repair there is",
        solution=reestimate,
        cases=_statistics_cases,
        mistakes=(
            Mistake(
                "last batch only",
                lambda batches: _statistics(batches[-1:]),
                "only the last batch is in the result: each one overwrote the one before",
                "collect something of every batch before you average",
            ),
            Mistake(
                "moving average from the start values",
                _moving,
                "this is a moving average that started at mean 0 and variance 1; after a few batches most of it is still the start",
                "no batch, and nothing from before the first, may count more than another",
            ),
            Mistake(
                "all images in one batch",
                lambda batches: _statistics([torch.cat(batches)]),
                "all batches were put together first, so the variance also holds how far their means lie apart",
                "reduce each batch to one number per channel before they meet",
            ),
            Mistake(
                "large batches count more",
                lambda batches: _statistics(batches, by_size=True),
                "each batch was weighted by its size, so a small last one counts less",
                "the docstring says *plain* averages over the batches",
            ),
            Mistake(
                "biased variance",
                lambda batches: _statistics(batches, unbiased=False),
                "the variance was divided by the number of values; a running variance is the unbiased one",
                "a sample varies less around its own mean than around the true one, by one value's worth",
            ),
            Mistake(
                "standard deviation",
                lambda batches: _statistics(batches, root=True),
                "that is the standard deviation; a batch norm stores its square",
                "the batch norm takes the root itself, after it has added its ε",
            ),
            Mistake(
                "positions averaged first",
                lambda batches: _statistics(batches, positions=False),
                "each image was averaged over its positions first, so the variance within an image is missing",
                "every position of every image is a value of its channel",
            ),
        ),
        hints=(
            "only dimension 1, the channels, stays; all others are reduced, in one go",
            "batch.transpose(0, 1).flatten(1) has one row per channel, whatever the number of dimensions",
            "one mean and one `var` (unbiased is torch's default) per batch and row; then stack them and take mean(0)",
        ),
        rtol=1e-4,
    ),
    Exercise(
        id="qat-control",
        title="QAT against its control",
        notebook="03",
        minutes=10,
        difficulty="medium",
        objective="say what quantization changed when the training was the same, and how sure that is",
        solution=qat_minus_control,
        cases=_control_cases,
        mistakes=(
            Mistake(
                "control minus QAT",
                lambda *a: _verdict(*a, sign=-1),
                "the sign is the other way round: a gain of QAT comes out as a loss",
                "positive is to mean that QAT is the better one",
            ),
            Mistake(
                "arms taken apart",
                lambda *a: _verdict(*a, apart=True),
                "each arm got a variance of its own, and they were added: that forgets that both saw the same images and seeds",
                "an image that is hard for both says nothing about their difference: subtract first",
            ),
            Mistake(
                "every prediction independent",
                lambda *a: _verdict(*a, variance=lambda table: table.var() / table.numel()),
                "all predictions went into one variance, as if each seed had been tested on images of its own",
                "three trainings on the same images are not three times as many images",
            ),
            Mistake(
                "images only",
                lambda *a: _verdict(*a, of_seeds=False),
                "only other images could change this result: what another seed would give is not in the interval",
                "there is a second sample in the table, along its other dimension",
            ),
            Mistake(
                "seeds only",
                lambda *a: _verdict(*a, of_images=False),
                "only other seeds could change this result: that the images are a sample too is not in the interval",
                "there is a second sample in the table, along its other dimension",
            ),
            Mistake(
                "spread instead of uncertainty",
                lambda *a: _verdict(*a, spread=True),
                "this is how far single images and seeds lie apart, not how uncertain their mean is",
                "a mean of many is surer than one: by what was the variance to be divided?",
            ),
            Mistake(
                "biased variance",
                lambda *a: _verdict(*a, unbiased=False),
                "the variances were divided by the number of values: with three seeds that of the seeds is a third too small",
                "three values have two degrees of freedom",
            ),
        ),
        hints=(
            "make a table (seeds, images) of what QAT got right minus what the control got right",
            "its mean is the difference; table.mean(0) has one number an image, table.mean(1) one a seed",
            "variance = table.mean(0).var() / images + table.mean(1).var() / seeds; the rest is z and a square root",
        ),
    ),
    Exercise(
        id="learned-step",
        title="A step that learns",
        notebook="03",
        minutes=15,
        difficulty="hard",
        objective="make the scale a parameter, with the gradients of LSQ",
        solution=learned_step,
        cases=_step_cases,
        observe=_with_gradients,
        mistakes=(
            Mistake(
                "plain rounding",
                lambda *a: _step(*a, straight=False),
                "`x` gets no gradient, because the rounding stops it, and the scale misses the part that comes through x / scale",
                "the straight-through estimator goes around `torch.round`, here as before",
            ),
            Mistake(
                "no gradient scale",
                lambda *a: _step(*a, factor=lambda count, qmax: 1.0),
                "the gradient of the scale is the plain sum over all values, and such steps are giant ones",
                "one factor in the docstring is missing",
            ),
            Mistake(
                "gradient scale without qmax",
                lambda *a: _step(*a, factor=lambda count, qmax: count**-0.5),
                "the factor is 1 / √count: more bits make the scale smaller, so qmax belongs under the root as well",
                "read the factor in the docstring again",
            ),
            Mistake(
                "gradient scale without the root",
                lambda *a: _step(*a, factor=lambda count, qmax: 1 / (count * qmax)),
                "the factor is 1 / (count · qmax), without the root: the scale hardly moves any more",
                "read the factor in the docstring again",
            ),
            Mistake(
                "gradient scale on x too",
                lambda *a: _step(*a, x_too=True),
                "the factor was put on the whole result, so the gradient of `x` shrank too",
                "it belongs to the scale, before the scale meets `x`",
            ),
            Mistake(
                "division taken as a constant",
                lambda *a: _step(*a, fixed=True),
                "the scale got no gradient through x / scale: inside the range the slope is round(x / scale) alone",
                "the scale appears twice in the formula, and both places count",
            ),
            Mistake(
                "nothing from clipped values",
                lambda *a: _step(*a, clipped=False),
                "values outside the range gave the scale no gradient; so it never learns to make room for them",
                "a clipped value comes back as qmax · scale, and that changes with the scale",
            ),
        ),
        hints=(
            "leave the factor out at first: with the straight-through estimator autograd finds both gradients by itself",
            "clamp x / scale first, then round it straight-through, then multiply by scale: scale is in there twice",
            "s = scale.detach() + factor * (scale - scale.detach()) has the value of scale, and a gradient times factor",
        ),
        rtol=1e-4,
        atol=1e-5,
    ),
)
