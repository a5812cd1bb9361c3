import io
import re
import statistics
import time

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import PIL.Image
import pytest
import torch

from course_utils import affine, data, formats, observers, plots, roofline, simulate, stats, weights, widgets
from course_utils.tools import run
from tests.explorers import CEILINGS, LOSSES, MAKERS, MILLISECONDS, RESULTS, TEXTS, WORK, generator, images, network
from tests.toys import nbval, write_notebook

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    with matplotlib.rc_context():
        yield
    plt.close("all")


def another(control):
    """Return a value that a control does not have yet."""
    if isinstance(control, ipywidgets.Text):
        return "-3.5"
    if isinstance(control, ipywidgets.FloatRangeSlider):
        return control.min / 2, control.max / 3
    if isinstance(control, ipywidgets.FloatLogSlider):
        return control.value / 2
    if isinstance(control, ipywidgets.IntSlider):
        return control.value + 1
    return next(value for _, value in control._options_full if value != control.value)


def plain(explorer):
    """Return the text of a widget without tags."""
    return re.sub(r"<[^>]+>", " ", explorer.text.value)


def texts(figure):
    return " ".join(found.get_text() for found in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("name", MAKERS)
def test_each_control_changes_picture_and_text_and_its_old_value_brings_the_old_ones_back(name):
    for control in MAKERS[name]().controls:
        explorer = MAKERS[name]()
        moved = explorer.controls[control]
        assert moved.description
        old, picture, text = moved.value, explorer.image.value, explorer.text.value
        moved.value = another(moved)
        assert explorer.image.value != picture and explorer.text.value != text, control
        moved.value = old
        assert explorer.image.value == picture and explorer.text.value == text, control


@pytest.mark.parametrize("name", MAKERS)
def test_a_picture_is_small_opaque_light_and_the_same_in_every_style(name):
    explorer = MAKERS[name]()
    picture = PIL.Image.open(io.BytesIO(explorer.image.value))
    assert picture.format == "PNG" and len(explorer.image.value) < 40_000
    assert (
        picture.mode == "P"
        and "transparency" not in picture.info
        and min(picture.convert("RGB").getpixel((0, 0))) > 250
    )
    plt.style.use("dark_background")
    plots.setup()
    again = MAKERS[name]()
    assert again.image.value == explorer.image.value
    assert again._figure.get_layout_engine() is None  # it would double the time of a move


@pytest.mark.parametrize("name", MAKERS)
def test_a_move_answers_soon_and_leaves_no_figure(name):
    explorer = MAKERS[name]()
    control = next(iter(explorer.controls.values()))
    seconds, seen = [], set()
    for value in [another(control), control.value] * 3:
        began = time.perf_counter()
        control.value = value
        seconds.append(time.perf_counter() - began)
        seen.add((explorer.image.value, explorer.text.value))
    assert len(seen) == 2
    assert statistics.median(seconds) < 1  # it takes less than a tenth of that; this machine may be busy
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", MAKERS)
def test_the_still_version_shows_each_of_its_frames_and_leaves_the_controls_alone(name):
    explorer = MAKERS[name]()
    before = explorer.choice(), explorer.image.value
    figure = explorer.still()
    assert isinstance(figure, matplotlib.figure.Figure) and plt.get_fignums() == [figure.number]
    assert 3 <= len(explorer.frames) <= 4
    each = len(explorer._figure.axes)
    assert len(figure.axes) == each * len(explorer.frames)
    assert (explorer.choice(), explorer.image.value) == before
    control = next(iter(explorer.controls))
    value = another(explorer.controls[control])
    assert len(explorer.still({control: value}).axes) == each
    with pytest.raises(ValueError, match=f"no control is called colour; there are: {control}"):
        explorer.still({"colour": "red"})


def test_shown_in_a_notebook_a_widget_is_its_box_and_a_sentence():
    explorer = MAKERS["NumberBits"]()
    bundle = explorer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.model_id
    assert bundle["text/plain"] == "NumberBits: live in a notebook that runs; its still version follows."
    assert plain(explorer) and explorer.image.value in [child.value for child in explorer.widget.children[1:]]


@pytest.mark.parametrize("number", ["0.1", "-3", "70000", "1e-9", "inf"])
def test_the_bits_of_a_number_are_those_of_the_formats(number):
    explorer = widgets.NumberBits(1.0)
    explorer.controls["number"].value = number
    shown, drawn = plain(explorer), texts(explorer._figure)
    for form in (formats.FP32, formats.BF16, formats.FP16, formats.FP8_E4M3, formats.FP4_E2M1, formats.INT8):
        x = float(number)
        fields, value = form.bits_of(x), float(form.round(x))
        error = "exact" if value == x else f"{abs(value - x):.3g}"
        row = " +".join([form.name, *(part or "–" for part in fields), re.escape(f"{value:.7g}"), re.escape(error)])
        assert re.search(row, shown), row
        assert f"= {value:.7g}" in drawn
    axis, int4 = explorer._figure.axes[0], "".join(formats.INT4.bits_of(float(number)))
    assert [text.get_text() for text in axis.texts[:4]] == list(int4)
    assert [cell.get_alpha() for cell in axis.patches[:4]] == [plots.BIT_ALPHA[bit] for bit in int4]
    assert ("exact in none" in shown) == (number in ("0.1", "1e-9"))


@pytest.mark.parametrize(
    ("typed", "sentence"), [("1,5", "“1,5” is not a number"), ("", "not a number"), ("nan", "NaN")]
)
def test_of_what_is_no_number_the_widget_says_so_and_keeps_its_picture(typed, sentence):
    explorer = widgets.NumberBits()
    picture, text = explorer.image.value, explorer.text.value
    explorer.controls["number"].value = typed
    assert sentence in plain(explorer) and explorer.image.value == picture
    explorer.controls["number"].value = "0.15625"
    assert explorer.text.value == text


def test_text_that_is_typed_stays_text():
    explorer = widgets.NumberBits()
    explorer.controls["number"].value = "<img src=x>"
    assert "<img" not in explorer.text.value and "“&lt;img src=x&gt;” is not a number" in plain(explorer)


def set_range(explorer, bits, low, high):
    explorer.controls["bits"].value = bits
    explorer.controls["clip"].value = low, high


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -1.5, 2.0), (4, -1.0, 1.0), (2, 0.0, 2.0)])
def test_a_dragged_range_gives_the_errors_of_affine(bits, low, high):
    x = torch.randn(5000, generator=generator())
    explorer = MAKERS["ClipRange"]()
    set_range(explorer, bits, low, high)
    q = affine.qparams_from_range(low, high, bits=bits)
    assert explorer.controls["scale"].value == pytest.approx(float(q.scale))
    assert explorer.controls["zero_point"].value == int(q.zero_point) and explorer.controls["zero_point"].max == q.qmax
    rounded = affine.fake_quantize(x, q)
    grid = affine.dequantize(torch.arange(q.qmax + 1), q)
    outside = (x < grid[0]) | (x > grid[-1])
    rounding = affine.sqnr(x, torch.where(outside, x, rounded))
    clipping = affine.sqnr(x, torch.where(outside, rounded, x))
    best = affine.sqnr(x, affine.fake_quantize(x, observers.MSE().observe(x).qparams(bits=bits)))
    shown = plain(explorer)
    assert f"SQNR {affine.sqnr(x, rounded):.1f} dB" in shown and f"(observer MSE) has {best:.1f} dB" in shown
    assert f"{outside.double().mean():.2%} of 5,000 values lie outside" in shown
    assert re.findall(r"(-?[\d.]+) dB", shown)[-3:-1] == [f"{-rounding:.1f}", f"{-clipping:.1f}"]
    assert len(explorer._figure.axes[0].collections[0].get_segments()) == 2**bits


def test_scale_and_zero_point_move_the_range():
    explorer = MAKERS["ClipRange"]()
    explorer.controls["scale"].value = 0.25
    explorer.controls["zero_point"].value = 4
    assert explorer.controls["clip"].value == pytest.approx((-1.0, 2.75))
    assert "cover -1 to 2.75 in steps of 0.25 (scale), and 0 is the integer 4" in plain(explorer)


def test_nothing_is_clipped_within_the_range():
    explorer = widgets.ClipRange(torch.tensor([0.0, 0.5, 1.0], requires_grad=True))
    set_range(explorer, 4, 0.0, 1.0)
    assert "0.00% of 3 values" in plain(explorer) and "none" in plain(explorer)


def test_of_a_large_tensor_the_same_values_are_taken_each_time():
    x = torch.randn(40_000, generator=generator())
    one, two = widgets.ClipRange(x), widgets.ClipRange(x)
    assert len(one.values) == 2**15 and torch.equal(one.values, two.values)
    assert plain(one) == plain(two) != ""


@pytest.mark.parametrize("granularity", ["tensor", "channel", 32])
@pytest.mark.parametrize("bits", [8, 2])
def test_the_error_of_filters_is_that_of_the_policy(bits, granularity):
    weight = torch.randn(5, 2, 3, 3, generator=generator())
    explorer = MAKERS["FilterError"]()
    explorer.controls["bits"].value, explorer.controls["granularity"].value = bits, granularity
    policy = simulate.Policy(weights=bits, granularity=granularity)
    rounded = affine.fake_quantize(weight, simulate.weight_qparams(weight, policy, bits))
    worst = min(affine.sqnr(*pair) for pair in zip(weight, rounded, strict=True))
    shown = plain(explorer)
    assert f"SQNR {affine.sqnr(weight, rounded):.1f} dB over all weights, {worst:.1f} dB in the worst filter" in shown
    scales = {"tensor": 1, "channel": 5, 32: 5}[granularity]
    assert f"takes {bits + 16 * scales / 90:.2f} bits" in shown
    first, wrong, _ = explorer._figure.axes
    # Five tiles in rows of three, with a gap after each.
    assert torch.equal(torch.tensor(first.images[0].get_array()[4:7, 4:7]), rounded[4, 0])
    error = (rounded - weight)[4, 0].abs() / weight.abs().max()
    assert torch.allclose(torch.tensor(wrong.images[0].get_array()[4:7, 4:7]), error.log10().clamp(min=-3))


def test_a_filter_of_zeros_has_no_error_that_counts():
    weight = torch.randn(3, 1, 3, 3, generator=generator())
    weight[0] = 0
    shown = plain(widgets.FilterError(weight, granularities=("tensor", "channel")))
    assert "nan" not in shown and "dB in the worst filter" in shown


def test_the_accuracy_of_a_calibration_set_is_that_of_all_its_repetitions():
    explorer = MAKERS["CalibrationSet"]()
    explorer.controls["kind"].value, explorer.controls["images"].value = "too dark", 16
    found = RESULTS["too dark", 16]
    accuracy = stats.Proportion(sum(each.second.successes for each in found), 200)
    change, low, high = (100 * part for part in stats.paired_difference(0, sum(each.broke for each in found), 200))
    shown = plain(explorer)
    assert f"accuracy {accuracy} on 200 images, FP32 95.00%" in shown
    assert f"difference {change:+.2f} points [{low:+.2f}, {high:+.2f}]" in shown
    assert f"too dark, 16 images: {accuracy.value:.1%}" in texts(explorer._figure)
    assert re.search(r"noise +88.0% +89.0% +89.0%", shown)


def test_probabilities_are_those_of_the_network_with_so_many_bits():
    model, found = network(), images()
    explorer = widgets.Predictions(model, found, bits=(8, 2))
    batch, labels = next(iter(data.batches(found, 3)))
    explorer.controls["bits"].value = "2 bits"
    with torch.no_grad():
        shares = weights.fake_quantize_weights(model, bits=2)(batch).softmax(1)
    shown = plain(explorer)
    for row, label in zip(shares, labels, strict=True):
        best = int(row.argmax())
        right = "yes" if best == label else "no"
        assert re.search(f"{data.CLASSES[label]} +{data.CLASSES[best]} +{row[best]:.0%} +{right}", shown)
    assert f"{int((shares.argmax(1) == labels).sum())} of 3 pictures" in shown
    bars = explorer._figure.axes[2].collections[0].get_segments()
    assert torch.allclose(torch.tensor([bar[1][1] for bar in bars]), shares.flatten().double())


def test_another_way_to_fewer_bits_can_be_passed_and_the_network_stays_as_it_was():
    model, seen = network().train(), []

    def reduce(found, *, bits):
        seen.append(bits)
        return weights.fake_quantize_weights(found, bits=bits, axis=None)

    explorer = widgets.Predictions(model, images(), bits=(4, 3), reduce=reduce)
    assert seen == [4, 3] and model.training and not model[0]._forward_hooks
    assert list(explorer.controls["bits"].options) == ["32 bits", "4 bits", "3 bits"]
    assert "bits" in plain(explorer)


def test_a_text_is_shown_with_its_loss_and_grey_as_far_as_it_is_the_first_one():
    explorer = MAKERS["WrittenText"]()
    explorer.controls["label"].value = "W4 nearest"
    shared = "In the beginning God created the "
    assert f"71 characters, the first {len(shared)} as with FP32" in plain(explorer)
    assert "1.50 nats per character, +0.25 against FP32" in plain(explorer)
    assert "$3 &amp; &lt;b&gt;</pre>" in explorer.text.value
    same, other = (text.get_text() for text in explorer._figure.texts[:2])
    assert same == f"{shared}\n" and other == " " * len(shared) + "sons of the LORD,\nand he said $3 & <b>"


def test_texts_need_no_loss_and_long_lines_are_wrapped():
    explorer = widgets.WrittenText({"FP32": "word " * 40, "W2": "x " * 900})
    assert not explorer._figure.axes and "nats" not in plain(explorer)
    explorer.controls["label"].value = "W2"
    lines = explorer._figure.texts[1].get_text().split("\n")
    assert len(lines) == 8 and max(map(len, lines)) <= 76


@pytest.mark.parametrize(("layer", "precision"), [("conv1", "FP32"), ("fc", "FP32"), ("conv1", "INT8"), ("fc", "INT8")])
def test_a_layer_has_its_share_of_the_roof_and_what_limits_it(layer, precision):
    explorer = MAKERS["Roofline"]()
    explorer.controls["layer"].value, explorer.controls["precision"].value = layer, precision
    work = next(w for w in WORK[precision] if w.name == layer)
    limit = roofline.attainable(CEILINGS, work.intensity, precision)
    reached = roofline.achieved([work], MILLISECONDS[precision])
    shown = plain(explorer)
    assert f"{work.intensity:.1f} operations a byte" in shown and f"to {limit / 1e9:,.1f} G operations/s" in shown
    assert f"{'Arithmetic' if layer == 'conv1' else 'Memory'} limits it" in shown
    if reached:
        assert f"It reached {reached[0][1] / 1e9:,.1f} (star): {reached[0][1] / limit:.0%} of that" in shown
    else:
        assert "reached" not in shown
    star = explorer._figure.axes[0].lines[-1]
    assert star.get_visible() == bool(reached)


def test_a_precision_without_a_ceiling_is_left_out():
    explorer = MAKERS["Roofline"]()
    assert list(explorer.controls["precision"].options) == ["FP32", "INT8"]
    assert "FP32" in plain(explorer) and "BF16" not in plain(explorer)


BAD = {
    "not a number": lambda: widgets.NumberBits("one"),
    "nothing but zeros: there is no range": lambda: widgets.ClipRange(torch.zeros(3)),
    "NaN or infinite": lambda: widgets.ClipRange(torch.tensor([1.0, torch.nan])),
    "expected a float tensor": lambda: widgets.ClipRange(torch.tensor([1, 2])),
    r"expected filters \(out, in, height, width\), got a tensor of shape \(3, 4\)": lambda: widgets.FilterError(
        torch.ones(3, 4)
    ),
    "nothing but zeros: there is no error": lambda: widgets.FilterError(torch.zeros(2, 1, 3, 3)),
    "granularity must be": lambda: widgets.FilterError(torch.ones(2, 1, 3, 3), granularities=("row",)),
    r"missing: \[\('b', 4\)\]": lambda: widgets.CalibrationSet(
        {("a", 1): RESULTS["real", 1], ("a", 4): RESULTS["real", 1], ("b", 1): RESULTS["real", 1]}
    ),
    "missing: all": lambda: widgets.CalibrationSet({}),
    "room for 1 to 6 images, got 7": lambda: widgets.Predictions(network(), images(7)),
    "texts of at least two models, got 1": lambda: widgets.WrittenText({"FP32": "a"}),
    "but not both, for W2 nearest": lambda: widgets.WrittenText(TEXTS, {k: LOSSES[k] for k in list(LOSSES)[:2]}),
    "no layer in a precision that has a ceiling: FP32, INT8": lambda: widgets.Roofline(
        CEILINGS, {"BF16": WORK["BF16"]}
    ),
    "the same layers in the same order": lambda: widgets.Roofline(CEILINGS, WORK | {"INT8": WORK["INT8"][:1]}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_told_in_a_sentence(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_a_notebook_with_a_widget_is_the_same_after_each_run_and_passes_the_comparison(tmp_path):
    path = write_notebook(
        tmp_path / "00_toy.ipynb",
        "from course_utils import plots, widgets\nplots.setup()",
        "explorer = widgets.NumberBits(0.1)\nexplorer",
        "figure = explorer.still()",
        "explorer.controls['number'].value = '2'\nlen(explorer.image.value) > 0",
    )
    written = []
    for _ in range(2):
        assert run.run(tmp_path, ledger=tmp_path / "ledger.json", results=tmp_path / "results") == 0
        written.append(path.read_bytes())
    assert written[0] == written[1] and b"2 is exact in FP32" in written[0]
    assert nbval(tmp_path).returncode == 0


@pytest.mark.parametrize("largest, shown", [(0.003, ".5f"), (0.5, ".3f"), (6.0, ".2f"), (2000.0, ".0f")])
def test_the_range_is_read_out_in_decimals_that_suit_the_tensor(largest, shown):
    explorer = widgets.ClipRange(torch.linspace(-largest, largest, 100))
    assert explorer.controls["clip"].readout_format == shown and "SQNR" in plain(explorer)
