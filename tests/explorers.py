"""One of each widget on data that are made in a moment, for the tests in Python and those in a browser."""

import torch
from torch import nn

from course_utils import data, measure, widgets
from course_utils.roofline import Ceilings, Work

KINDS, COUNTS = {"real": 1, "noise": 6, "too dark": 40}, (1, 16, 256)
TEXTS = {
    "FP32": "In the beginning God created the heaven and the earth.\nAnd the earth was without form.",
    "W4 nearest": "In the beginning God created the sons of the LORD,\nand he said $3 & <b>",
    "W2 nearest": "q;zz(y",
}
LOSSES = {"FP32": 1.25, "W4 nearest": 1.5, "W2 nearest": 4.0}
CEILINGS = Ceilings({"FP32": 100e9, "INT8": 400e9}, 20e9, 2, {})
WORK = {
    name: [Work("conv1", 200_000_000, 10_000_000 * width / 4), Work("fc", 1_000_000, 500_000 * width)]
    for name, width in {"FP32": 4, "BF16": 2, "INT8": 1}.items()
}
MILLISECONDS = {"FP32": {"conv1": 4.0, "fc": 0.2}, "INT8": {"conv1": 1.0}}


def generator():
    return torch.Generator().manual_seed(0)


def comparison(broke, seed):
    """Return a `Comparison` on 100 images of a network that gets 95 of them right with one that gets `broke` fewer."""
    labels = torch.randint(10, (100,), generator=torch.Generator().manual_seed(seed))
    first, second = labels.clone(), labels.clone()
    first[:5] = second[: 5 + broke] = 10
    return measure.compare_predictions(first, second, labels)


def network():
    """Return a small network for images."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)).eval()


def images(n=3):
    return data.Images(
        torch.randint(256, (n, 28, 28), generator=generator(), dtype=torch.uint8), torch.arange(n) % 10, size=16
    )


RESULTS = {
    (kind, n): [comparison(broke + (n == 1), seed) for seed in range(2)]
    for kind, broke in KINDS.items()
    for n in COUNTS
}
MAKERS = {
    "NumberBits": lambda: widgets.NumberBits(0.1),
    "ClipRange": lambda: widgets.ClipRange(torch.randn(5000, generator=generator()), title="noise"),
    "FilterError": lambda: widgets.FilterError(torch.randn(5, 2, 3, 3, generator=generator()), title="conv1"),
    "CalibrationSet": lambda: widgets.CalibrationSet(RESULTS),
    "Predictions": lambda: widgets.Predictions(network(), images(), bits=(8, 4, 2)),
    "WrittenText": lambda: widgets.WrittenText(TEXTS, LOSSES),
    "Roofline": lambda: widgets.Roofline(CEILINGS, WORK, MILLISECONDS),
}
