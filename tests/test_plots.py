import io
import itertools

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from course_utils import plots
from course_utils.stats import Proportion

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    with matplotlib.rc_context():
        plots.setup()
        yield
    plt.close("all")


def texts(figure):
    """Everything that can be read in a figure."""
    figure.canvas.draw()
    return " ".join(found.get_text() for found in figure.findobj(matplotlib.text.Text))


def test_the_bits_of_numbers_can_be_read_with_their_labels():
    figure = plots.number_bits([("one", "0011", 2), ("minus", "10", 1)], title="Bits")
    shown = texts(figure)
    assert all(word in shown for word in ("one", "minus", "Bits"))
    assert len(figure.axes[0].patches) == 6


@pytest.mark.parametrize(("log", "ticks"), [(False, [3, 2]), (True, [1, 2])])
def test_number_lines_tick_every_number_in_the_order_given_from_the_top(log, ticks):
    grids = {"signed": torch.tensor([-1.0, 0.0, 1.0]), "positive": torch.tensor([1.0, 2.0])}
    axis = plots.number_lines(grids, xlabel="value", title="Lines", log=log).axes[0]
    assert [len(collection.get_segments()) for collection in axis.collections] == ticks[::-1]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["positive", "signed"]
    assert axis.get_xscale() == ("log" if log else "linear")


def test_clip_or_round_adds_its_two_errors_and_names_the_marks():
    rounding, clipping = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 1.0, 0.0])
    figure = plots.clip_or_round(
        [0.1, 0.5, 1.0], {"4 bits": (rounding, clipping)}, {"4 bits": {"min-max": 1.0, "MSE": 0.5}}, xlabel="t"
    )
    curves = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert curves["both"] == [5, 3, 3]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines[3:]] == [1.0, 0.5]
    assert all(word in texts(figure) for word in ("rounding error", "clipping error", "min-max", "MSE", "4 bits"))


def test_a_panel_a_grid_with_a_tick_for_every_value():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    grids = {"INT2": torch.tensor([-1.0, 0.0, 1.0]), "INT3": torch.linspace(-1, 1, 7)}
    figure = plots.histogram_with_grid(values, grids, title="Weights")
    assert [len(axis.collections[0].get_segments()) for axis in figure.axes] == [3, 7]
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == 1000
    assert all(word in texts(figure) for word in ("INT2", "INT3", "Weights"))


def test_predictions_are_green_when_right_and_red_when_wrong():
    pixels = torch.zeros(2, 28, 28, dtype=torch.uint8)
    shares = {"FP32": torch.tensor([[0.9, 0.1], [0.8, 0.2]])}
    figure = plots.predictions(pixels, torch.tensor([0, 1]), shares, ("bag", "coat"))
    best = [matplotlib.colors.to_hex(axis.patches[0].get_facecolor()) for axis in figure.axes[2:]]
    assert best == [plots.GREEN.lower(), plots.RED.lower()]
    assert all(word in texts(figure) for word in ("FP32", "bag", "coat"))


@pytest.mark.parametrize("rows", [1, 3])
def test_filters_are_one_row_a_weight_in_one_colour_scale(rows):
    weight = torch.randn(16, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    figure = plots.filters([weight] * rows, [f"row {i}" for i in range(rows)])
    assert len(figure.axes) == 16 * rows
    assert len({axis.images[0].get_clim() for axis in figure.axes}) == 1


def test_the_ladder_shows_values_with_their_intervals_and_lower_bits_to_the_right():
    share = Proportion(90, 100)
    results = {"per channel": {4: Proportion(80, 100), 8: share}, "per tensor": {4: Proportion(10, 100), 8: share}}
    figure = plots.ladder(results, reference=share, title="Ladder")
    axis = figure.axes[0]
    line, _, (bars,) = axis.containers[0].lines
    assert line.get_color() == plots.COLOURS["per channel"]
    assert line.get_xydata() == pytest.approx(torch.tensor([[8.0, 90.0], [4.0, 80.0]]).numpy())
    assert bars.get_segments()[0][:, 1] == pytest.approx([100 * share.low, 100 * share.high], abs=1e-3)
    assert axis.xaxis_inverted()
    assert all(word in texts(figure) for word in ("per channel", "per tensor", "FP32", "guessing", "Ladder"))


def test_intervals_are_in_the_order_given_from_the_top():
    figure = plots.intervals([("a", 1, 0.5, 2), ("b", 4, 3, 5)], xlabel="ratio", baseline=1)
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["b", "a"]
    assert list(axis.lines[0].get_xdata()) == [3, 5] and len(axis.lines) == 5


def test_channels_are_sorted_by_their_range():
    weight = torch.tensor([[0.0, 1.0], [-2.0, 2.0], [0.0, 0.5]])
    heights = [patch.get_height() for patch in plots.channel_ranges(weight).axes[0].patches]
    assert heights == pytest.approx([4, 1, 0.5])


def test_bars_are_in_the_order_given_from_the_top():
    figure = plots.bars({"FP32": 44.8, "INT8": 11.3}, xlabel="MB", colours=[plots.GREY, plots.BLUE])
    assert [patch.get_width() for patch in figure.axes[0].patches] == [11.3, 44.8]
    assert matplotlib.colors.to_hex(figure.axes[0].patches[0].get_facecolor()) == plots.BLUE.lower()


def test_lines_have_their_names_beside_them_when_there_are_several():
    one = plots.lines([1, 10], {"a": [1, 2]}, xlabel="x", ylabel="y")
    two = plots.lines([1, 10], {"a": [1, 2], "b": [3, 4]}, xlabel="x", ylabel="y", log=True)
    assert not one.axes[0].texts
    names = {text.get_text(): text for text in two.axes[0].texts}
    assert set(names) == {"a", "b"} and names["b"].xy[1] > names["a"].xy[1]
    assert [names[line.get_label()].get_color() for line in two.axes[0].lines] == [plots.BLUE, plots.ORANGE]
    assert two.axes[0].get_xscale() == two.axes[0].get_yscale() == "log"


SHARE, LESS = Proportion(90, 100), Proportion(50, 100)
W = torch.linspace(-2, 2, 32).reshape(2, 1, 4, 4)
# Of each picture two, that differ in one value.
PAIRS = {
    "number_bits": [([("a", bits, 2)],) for bits in ("0011", "0010")],
    "number_lines": [({"a": [0, last]},) for last in (1, 2)],
    "histogram_with_grid": [(W, {"a": torch.tensor([0.0, last])}) for last in (1, 2)],
    "predictions": [
        (torch.zeros(1, 28, 28, dtype=torch.uint8), torch.tensor([0]), {"a": torch.tensor([shares])}, ("bag", "coat"))
        for shares in ([0.9, 0.1], [0.2, 0.8])
    ],
    "filters": [([W, w], "ab") for w in (W, -W)],
    "ladder": [({"a": {8: SHARE, 4: share}},) for share in (SHARE, LESS)],
    "intervals": [([("a", value, 0, 2)],) for value in (1, 1.5)],
    "clip_or_round": [([1, 2, 3], {"a": ([1, 2, 3], [3, last, 1])}, {"a": {"MSE": 2}}) for last in (1, 2)],
    "channel_ranges": [(w,) for w in (W, 2 * W)],
    "bars": [({"a": 1, "b": value},) for value in (2, 3)],
    "lines": [([1, 2], {"a": [1, value]}) for value in (2, 3)],
    "interval_lines": [([1, 2], {"a": ([1, 2], [0, 1], [2, high])}) for high in (3, 4)],
    "curves": [({"a": ([1, 2], [1, value])},) for value in (2, 3)],
    "pareto": [({"a": [(1, value, 0, 9, "b")]},) for value in (2, 3)],
    "clusters": [({"a": w},) for w in (W, W / 2)],
    "roofline": [({"FP32": peak}, 20e9, {"FP32": [(50, 8e9, "conv")]}) for peak in (1e11, 2e11)],
}
OPTIONS = {"clusters": {"qmin": -2, "qmax": 1}, "curves": {"labels": "ab", "xlabel": "x", "ylabel": "y"}}
OPTIONS |= {name: {"xlabel": "x"} for name in ("number_lines", "intervals", "clip_or_round", "bars")}
OPTIONS |= {name: {"xlabel": "x", "ylabel": "y"} for name in ("lines", "interval_lines", "pareto")}


@pytest.mark.parametrize("name", PAIRS)
def test_another_value_is_another_picture(name):
    pictures = []
    for arguments in PAIRS[name]:
        file = io.BytesIO()
        getattr(plots, name)(*arguments, **OPTIONS.get(name, {})).savefig(file, format="png")
        pictures.append(file.getvalue())
    assert pictures[0] != pictures[1]


def test_the_courses_style_is_that_of_every_picture_after_it():
    matplotlib.rcdefaults()
    plots.setup()
    axis = plt.figure().add_subplot()
    assert not axis.spines["top"].get_visible() and axis.plot([1])[0].get_color() == plots.BLUE


def test_each_kind_of_picture_has_its_pair():
    assert set(PAIRS) == {name for name, each in vars(plots).items() if callable(each) and name[0] != "_"} - {"setup"}


def test_the_same_data_gives_the_same_bytes():
    def picture():
        file = io.BytesIO()
        plots.bars({"a": 1, "b": 2}, xlabel="x").savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()

    assert picture() == picture()


def test_lines_with_intervals_have_a_band_each_and_name_their_counts():
    series = {"real": ([1, 2], [0, 1], [2, 3]), "noise": ([3, 3], [2, 2], [4, 4])}
    axis = plots.interval_lines(
        [1, 64], series, xlabel="images", ylabel="%", title="Audit", log2=True, baseline=2
    ).axes[0]
    assert len(axis.collections) == 2 and len(axis.lines) == 3
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "64"]
    assert {text.get_text() for text in axis.texts} == {"real", "noise"}


def test_where_bits_fall_to_the_right_a_name_is_at_the_end_of_its_line():
    series = {"nearest": ([0, 9], [0, 9], [0, 9]), "GPTQ": ([0, 1], [0, 1], [0, 1])}
    axis = plots.interval_lines([4, 2], series, xlabel="bits", ylabel="nats").axes[0]
    assert axis.xaxis_inverted()
    names = {text.get_text(): axis.transAxes.transform(text.xy)[1] for text in axis.texts}
    for name, (values, *_) in series.items():
        assert names[name] == pytest.approx(axis.transData.transform((2, values[-1]))[1], abs=2)


def test_a_pareto_plot_joins_the_points_of_a_strategy_by_size_and_labels_each():
    figure = plots.pareto({"uniform": [(5, 90, 89, 91, "4 bits"), (2, 50, 48, 52, "2 bits")]}, xlabel="MB", ylabel="%")
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [2, 5] and line.get_ydata().tolist() == [50, 90]
    assert all(word in texts(figure) for word in ("2 bits", "4 bits", "uniform"))


def test_labels_of_points_close_together_do_not_lie_on_one_another():
    series = {name: [(5, 90 + i / 20, 89, 91, f"W{i}")] for i, name in enumerate(("nearest", "GPTQ", "QAT"))}
    axis = plots.pareto(series | {"far": [(9, 80, 79, 81, "FP32")]}, xlabel="MB", ylabel="%").axes[0]
    boxes = [text.get_window_extent() for text in axis.texts]
    assert [text.get_text() for text in axis.texts] == ["W0", "W1", "W2", "FP32"]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_sizes_far_apart_fit_on_a_logarithmic_axis_with_plain_numbers():
    figure = plots.pareto(
        {"all": [(44, 94, 93, 95, "FP32"), (2.8, 93, 92, 94, "W2")]}, xlabel="MB", ylabel="%", log=True
    )
    assert figure.axes[0].get_xscale() == "log" and "10" in texts(figure).split() and "10^" not in texts(figure)


def test_each_point_of_a_curve_has_its_label():
    series = {"2 bits": ([2.5, 2.1], [8, 7]), "3 bits": ([3.5, 3.1], [14, 13])}
    figure = plots.curves(series, labels=["32", "128"], xlabel="bits", ylabel="dB", title="Groups")
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[8, 7], [14, 13]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["32", "128", "2 bits", "32", "128", "3 bits"]
    figure.canvas.draw()
    lowest = min(text.get_window_extent().y0 for text in figure.axes[0].texts)
    assert lowest > figure.axes[0].get_window_extent().y0, "a label lies on the axis"
    assert all(word in texts(figure) for word in ("2 bits", "3 bits", "dB", "Groups"))


def test_clusters_draw_one_histogram_a_frame_with_a_tick_for_each_integer():
    w = torch.tensor([[-5.0, -1.0], [0.1, 0.9]])
    figure = plots.clusters({"first": w, "last": w.round()}, qmin=-2, qmax=1, title="weights")
    assert [axis.get_title() for axis in figure.axes] == ["first", "last"]
    for axis in figure.axes:
        assert sum(patch.get_height() for patch in axis.patches) == 4  # one far below the range included
        assert axis.get_xticks().tolist() == [-2, -1, 0, 1]


def test_a_roofline_has_one_slope_a_roof_for_each_precision_and_the_layers_below():
    points = {"FP32": [(50, 80e9, "conv1"), (0.5, 1e9, "fc")], "INT8": [(200, 300e9, "conv1")]}
    figure = plots.roofline({"FP32": 100e9, "INT8": 400e9}, 20e9, points, title="Roofline", named=("fc",))
    axis = figure.axes[0]
    slope, fp32, int8 = axis.lines
    assert (slope.get_ydata() / slope.get_xdata()).tolist() == [20e9, 20e9] and slope.get_ydata()[1] == 400e9
    assert fp32.get_xdata()[0] == 5 and set(fp32.get_ydata()) == {100e9} and int8.get_xdata()[0] == 20
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert [found.get_offsets().tolist() for found in axis.collections] == [[[50, 80e9], [0.5, 1e9]], [[200, 300e9]]]
    assert axis.get_xlim()[0] < 0.5 and axis.get_xlim()[1] > 200
    assert all(word in texts(figure) for word in ("20 GB/s", "FP32: 100 G/s", "INT8: 400 G/s", "fc", "Roofline"))
    assert "conv1" not in texts(figure)


def test_names_at_the_right_do_not_lie_on_one_another():
    series = {f"line {i}": [0, i / 1000] for i in range(6)}
    figure = plots.lines([0, 1], series, xlabel="x", ylabel="y")
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 6 and all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))


def test_a_method_has_one_colour_in_every_picture():
    axis = plots.lines([1, 2], {"AdaRound": [1, 2], "nearest": [1, 3]}, xlabel="x", ylabel="y").axes[0]
    curve = plots.curves({"nearest, 3 bits": ([1, 2], [1, 2])}, labels="ab", xlabel="x", ylabel="y").axes[0]
    assert axis.lines[1].get_color() == curve.lines[0].get_color() == plots.COLOURS["nearest"]
    assert axis.lines[0].get_color() == plots.COLOURS["AdaRound"]
