"""Every plot against its stored picture, with a tolerance (pytest-mpl).

After a change that you meant: `pytest tests/test_pictures.py --mpl-generate-path=tests/pictures`, and look at them.
"""

import math

import matplotlib
import pytest
import torch

from course_utils import plots
from course_utils.stats import Proportion

matplotlib.use("Agg")


def picture(draw):
    """Make a test of `draw`, a function that returns a figure: it is compared with `tests/pictures/<its name>.png`."""
    compared = pytest.mark.mpl_image_compare(
        baseline_dir="pictures",
        filename=f"{draw.__name__.removeprefix('test_')}.png",
        style="default",
        tolerance=6,  # root mean square of 0 .. 255: versions of the font library differ by less, a lost label by more
        savefig_kwargs={"dpi": 60, "bbox_inches": "tight"},
    )

    def test():
        with matplotlib.rc_context():
            plots.setup()
            return draw()

    test.__name__ = draw.__name__
    return compared(test)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@picture
def test_number_bits():
    return plots.number_bits([("FP16", "0011110000000000", 5), ("E4M3", "10111000", 4)], title="bits")


@picture
def test_number_lines():
    return plots.number_lines(
        {"FP4": torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6]), "INT4": torch.arange(1.0, 8)}, xlabel="value", log=True
    )


@picture
def test_histogram_with_grid():
    grids = {"INT2": torch.tensor([-1.0, 0.0, 1.0]), "INT4": torch.linspace(-3, 3, 15)}
    return plots.histogram_with_grid(normal(4000), grids, title="weights")


@picture
def test_predictions():
    pixels = (normal(3, 28, 28).abs() * 60).clamp(0, 255).to(torch.uint8)
    shares = {"FP32": torch.eye(3), "INT2": torch.full((3, 3), 1 / 3) + torch.tensor([0.1, 0, 0])}
    return plots.predictions(pixels, torch.arange(3), shares, ("bag", "coat", "shirt"))


@picture
def test_filters():
    w = normal(16, 3, 5, 5)
    return plots.filters([w, w.round()], ["FP32", "INT2"])


@picture
def test_ladder():
    found = {
        "per tensor": {8: Proportion(94, 100), 4: Proportion(90, 100), 2: Proportion(10, 100)},
        "per channel": {8: Proportion(94, 100), 4: Proportion(93, 100), 2: Proportion(40, 100)},
        "another": {8: Proportion(93, 100), 4: Proportion(93, 100), 2: Proportion(60, 100)},
    }
    return plots.ladder(found, title="ladder", reference=Proportion(94, 100))


@picture
def test_intervals():
    return plots.intervals([("PTQ", 4.4, 4.2, 4.7), ("QAT", 4.5, 4.1, 4.9)], xlabel="ratio", baseline=1)


@picture
def test_clip_or_round():
    t = torch.linspace(0.1, 1, 30)
    panels = {f"{bits} bits": (t**2 / 2**bits, (1 - t) ** 3 / 4) for bits in (8, 4)}
    marks = {panel: {"min-max": 1.0, "MSE": 0.7} for panel in panels}
    return plots.clip_or_round(t, panels, marks, xlabel="threshold", title="clip or round")


@picture
def test_channel_ranges():
    return plots.channel_ranges(normal(24, 9) * torch.linspace(0.1, 2, 24)[:, None], title="channels")


@picture
def test_bars():
    return plots.bars({"FP32": 44.8, "INT8": 11.3}, xlabel="MB", title="file", colours=[plots.GREY, plots.BLUE])


@picture
def test_lines():
    series = {"AdaRound": [0.5] * 20, "as many at random": [1.5 + math.sin(i) / 2 for i in range(20)]}
    return plots.lines(range(20), series, xlabel="layer", ylabel="error / that of nearest", title="layers")


@picture
def test_interval_lines():
    def around(v):
        return [v, v + 1, v + 2], [v - 1, v, v + 1], [v + 1, v + 2, v + 3]

    return plots.interval_lines(
        [1, 16, 256],
        {"real": around(0), "noise": around(-5)},
        xlabel="images",
        ylabel="points",
        log2=True,
        baseline=0,
    )


@picture
def test_curves():
    series = {"2 bits": ([2.5, 2.2, 2.1], [8, 7, 6]), "3 bits": ([3.5, 3.2, 3.1], [14, 13, 12])}
    return plots.curves(series, labels=["32", "64", "128"], xlabel="bits", ylabel="SQNR, dB", title="groups")


@picture
def test_pareto():
    points = [(44.8, 94, 93.5, 94.5, "FP32"), (11.2, 93.9, 93.4, 94.4, "W8"), (5.6, 93.5, 93, 94, "W4")]
    return plots.pareto({"nearest": points, "QAT": [(2.8, 93, 92, 94, "W2")]}, xlabel="MB", ylabel="%", log=True)


@picture
def test_clusters():
    w = normal(2000) * 2
    return plots.clusters({"before": w, "after": w.round() + normal(2000) / 9}, qmin=-2, qmax=1, title="clusters")


@picture
def test_roofline():
    points = {"FP32": [(50, 80e9, "conv1"), (0.5, 1e9, "fc")], "INT8": [(200, 300e9, "conv1"), (2, 2e9, "fc")]}
    return plots.roofline({"FP32": 1e11, "INT8": 4e11}, 2e10, points, title="roofline", named=("fc",))


def test_every_plot_has_a_picture():
    public = {name for name, found in vars(plots).items() if callable(found) and found.__module__ == plots.__name__}
    drawn = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {name for name in public if not name.startswith("_")} - {"setup"} <= drawn


def test_a_changed_picture_is_noticed(tmp_path):
    """The tolerance is small enough to see that a label is missing."""
    from matplotlib.testing.compare import compare_images

    for name, title in (("with", "bits"), ("without", "")):
        with matplotlib.rc_context():
            plots.setup()
            figure = plots.bars({"FP32": 44.8, "INT8": 11.3}, xlabel="MB", title=title)
            figure.savefig(tmp_path / f"{name}.png", dpi=60)
    assert compare_images(str(tmp_path / "with.png"), str(tmp_path / "without.png"), tol=6) is not None
