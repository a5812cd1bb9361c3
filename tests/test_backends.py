import copy
import json
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.nn import functional as F

from course_utils import affine, backends, cpu, data, integer, measure, training
from course_utils.backends import Engine, torch_ao
from course_utils.backends.float_model import FloatModel
from tests.conftest import fingerprint


class SmallCNN(nn.Module):
    """A learner's own network, which `course_utils.models` does not know."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 10))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def outputs(model, images):
    with torch.no_grad():
        return model(images)


def need(engine):
    """Skip the test where `engine`, one of torch's own, does not run."""
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"engine {engine} does not run on this machine")


def integer_layers(model):
    """The convolution and linear layers that hold INT8 weights."""
    return [m for m in model.modules() if callable(getattr(m, "weight", None)) and m.weight().dtype == torch.qint8]


@pytest.fixture(scope="module")
def int8(resnet18, calibration):
    return backends.quantize_static(resnet18, calibration)


@pytest.fixture(scope="module")
def saved(int8, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "resnet18.safetensors"
    assert backends.save(int8, path) == path.stat().st_size
    return path


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return SmallCNN().eval()


def test_all_21_layers_of_resnet18_hold_integers_and_no_batch_norm_is_left(int8):
    assert len(integer_layers(int8)) == 21
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in int8.modules())
    assert not int8.training


def test_int8_logits_are_close_to_the_float_ones(resnet18, int8, images):
    expected, found = outputs(resnet18, images), outputs(int8, images)
    assert found.dtype == torch.float32
    bits = 7 if backends.recipe_of(int8)["reduce_range"] else 8  # of weights: with one fewer a step is twice as wide
    assert (found - expected).norm() < 0.05 * 2 ** (8 - bits) * expected.norm()


def test_the_int8_file_is_a_quarter_of_the_float_one(resnet18, saved):
    assert measure.size_on_disk(resnet18) / saved.stat().st_size == pytest.approx(4, abs=0.05)
    assert saved.stat().st_size == pytest.approx(11.25e6, rel=0.01)


def test_the_file_holds_integers(saved):
    tensors = load_file(saved)
    assert tensors["conv1.weight"].dtype == torch.int8
    assert tensors["conv1.weight.scales"].shape == (64,)


def test_a_reloaded_model_gives_identical_outputs(int8, saved, images):
    loaded = backends.load(saved)
    assert not loaded.training
    assert torch.equal(outputs(loaded, images), outputs(int8, images))
    assert backends.recipe_of(loaded) == backends.recipe_of(int8)


def test_a_fresh_process_gives_identical_outputs(int8, saved, images, tmp_path):
    save_file({"images": images.contiguous()}, tmp_path / "in")
    program = (
        "import sys, torch; from safetensors.torch import load_file, save_file; from course_utils import backends\n"
        "x = load_file(sys.argv[2])['images'].contiguous(memory_format=torch.channels_last)\n"
        "with torch.no_grad(): save_file({'logits': backends.load(sys.argv[1])(x)}, sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", program, saved, tmp_path / "in", tmp_path / "out"], check=True)
    assert torch.equal(load_file(tmp_path / "out")["logits"], outputs(int8, images))


def test_a_model_saved_again_is_the_same_file(saved, tmp_path):
    assert backends.save(backends.load(saved), tmp_path / "again") == saved.stat().st_size
    first, again = load_file(saved), load_file(tmp_path / "again")
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def test_quantizing_leaves_the_float_model_and_its_mode_alone(small, calibration):
    model = SmallCNN().train()
    before = fingerprint(model)
    made = [backends.quantize_static(model, calibration), backends.quantize_dynamic(model), backends.prepare_qat(model)]
    assert fingerprint(model) == before and all(m.training for m in model.modules())
    assert [backends.recipe_of(each)["kind"] for each in made] == ["static", "dynamic", backends.PREPARED]


def test_learners_see_no_warnings(small, calibration, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        int8 = backends.quantize_static(small, calibration)
        backends.save(int8, tmp_path / "model")
        assert not backends.load(tmp_path / "model", model=SmallCNN()).training


def test_the_ranges_come_from_all_calibration_batches(small, images):
    def scale_of(batches):
        return outputs(backends.quantize_static(small, batches), images)

    both = scale_of([images, 10 * images])
    assert torch.equal(both, scale_of([10 * images, images])) and not torch.equal(both, scale_of([images]))
    assert torch.equal(both, scale_of((x, None) for x in (images, 10 * images)))  # labels are not looked at


@pytest.mark.parametrize(
    "options", [{"per_channel": False}, {"observer": "histogram"}, {"engine": "x86"}, {"reduce_range": True}]
)
def test_other_ways_to_quantize_work_and_survive_the_file(small, calibration, images, tmp_path, options):
    need(options.get("engine", backends.default_engine()))
    int8 = backends.quantize_static(small, calibration, **options)
    recipe = backends.recipe_of(int8)
    assert recipe["kind"] == "static" and options.items() <= recipe.items()
    backends.save(int8, tmp_path / "model")
    loaded = backends.load(tmp_path / "model", model=SmallCNN())
    assert torch.equal(outputs(loaded, images), outputs(int8, images))


def test_the_histogram_observer_chooses_another_range(small, calibration, images):
    by_range, by_error = (backends.quantize_static(small, calibration, observer=o) for o in backends.OBSERVERS)
    assert not torch.equal(outputs(by_range, images), outputs(by_error, images))


def test_one_scale_a_tensor_is_one_scale_a_tensor(small, calibration, tmp_path):
    shapes = []
    for per_channel in (True, False):
        backends.save(backends.quantize_static(small, calibration, per_channel=per_channel), tmp_path / "model")
        shapes.append(load_file(tmp_path / "model")["features.0.weight.scales"].shape)
    assert shapes == [(8,), ()]


def test_dynamic_quantization_changes_linear_layers_only(resnet18, images, tmp_path):
    dynamic = backends.quantize_dynamic(resnet18)
    assert len(integer_layers(dynamic)) == 1 and isinstance(dynamic.conv1, nn.Conv2d)
    written = backends.save(dynamic, tmp_path / "model")
    assert 0.999 < written / measure.size_on_disk(resnet18) < 1  # the blog's file that did not shrink
    assert torch.equal(outputs(backends.load(tmp_path / "model"), images), outputs(dynamic, images))


def test_mobilenet_v2_works(mobilenet_v2, calibration, images, tmp_path):
    int8 = backends.quantize_static(mobilenet_v2, calibration)
    assert len(integer_layers(int8)) == 53
    backends.save(int8, tmp_path / "model")
    assert torch.equal(outputs(backends.load(tmp_path / "model"), images), outputs(int8, images))


def test_quantization_aware_training_ends_in_a_file_with_the_same_outputs(resnet18, images, tmp_path):
    prepared = backends.prepare_qat(resnet18)
    assert prepared.training
    some = data.fashion_mnist("train", size=32).subset(slice(64))
    training.finetune(prepared, some, steps=2, batch_size=8)
    before = fingerprint(prepared)
    int8 = backends.convert_qat(prepared)
    assert len(integer_layers(int8)) == 21 and not int8.training
    assert fingerprint(prepared) == before
    expected, found = outputs(prepared.eval(), images), outputs(int8, images)
    assert (found - expected).norm() < 0.1 * expected.norm()
    backends.save(int8, tmp_path / "model")
    assert tmp_path.joinpath("model").stat().st_size == pytest.approx(11.25e6, rel=0.01)
    assert torch.equal(outputs(backends.load(tmp_path / "model"), images), found)


def test_batch_norm_goes_on_learning_in_quantization_aware_training(small, images):
    prepared = backends.prepare_qat(small)
    norms = [m for m in prepared.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    loss = F.cross_entropy(prepared(images), torch.arange(8))
    loss.backward()
    assert len(norms) == 1 and norms[0].weight.grad.abs().sum() > 0
    assert not torch.equal(norms[0].running_mean, before[0])


def test_per_tensor_quantization_aware_training_works(small, images, tmp_path):
    prepared = backends.prepare_qat(small, per_channel=False)
    prepared(images)
    int8 = backends.convert_qat(prepared)
    backends.save(int8, tmp_path / "model")
    loaded = backends.load(tmp_path / "model", model=SmallCNN())
    assert torch.equal(outputs(loaded, images), outputs(int8, images))
    assert load_file(tmp_path / "model")["features.0.weight.scales"].shape == ()


def test_a_network_of_ones_own_is_loaded_with_its_float_module(small, calibration, images, tmp_path):
    int8 = backends.quantize_static(small, calibration)
    backends.save(int8, tmp_path / "model")
    with pytest.raises(ValueError, match="model="):
        backends.load(tmp_path / "model")
    loaded = backends.load(tmp_path / "model", model=SmallCNN())
    assert torch.equal(outputs(loaded, images), outputs(int8, images))


@pytest.mark.parametrize("reduce_range, overflows", [(None, True), (False, True), (True, False)])
def test_a_file_from_a_processor_with_vnni_says_so_on_one_without(
    small, calibration, tmp_path, monkeypatch, reduce_range, overflows
):
    need("onednn")
    monkeypatch.setattr(cpu, "is_x86", lambda: True)
    monkeypatch.setattr(cpu, "has_vnni", lambda: True)
    int8 = backends.quantize_static(small, calibration, engine="onednn", reduce_range=reduce_range)
    backends.save(int8, tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not backends.may_overflow(backends.load(tmp_path / "model", model=SmallCNN()))
    monkeypatch.setattr(cpu, "has_vnni", lambda: False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert backends.may_overflow(backends.load(tmp_path / "model", model=SmallCNN())) is overflows
    assert (
        any("model: its weights use all 8 bits" in str(w.message) and w.filename == __file__ for w in said) is overflows
    )


def test_an_engine_that_torch_was_built_without_says_so(monkeypatch):
    assert {engine.name for engine in torch_ao.engines()} == set(backends.FAMILIES["torch_ao"])
    monkeypatch.setattr(torch_ao, "FAMILIES", {"torch_ao": ("abacus",)})
    assert torch_ao.engines() == [Engine("abacus", False, "not in this build of torch")]


def test_only_a_network_with_all_8_bits_of_its_weights_can_overflow(small, calibration, monkeypatch):
    monkeypatch.setattr(backends, "needs_headroom", lambda engine: engine != "torch")
    whole, reduced = (backends.quantize_static(small, calibration, reduce_range=r) for r in (False, True))
    plain = backends.deploy(small, engine="torch")
    assert [backends.may_overflow(model) for model in (whole, reduced, plain)] == [True, False, False]


@pytest.mark.parametrize("wrong", [nn.Linear(3, 10), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())])
def test_a_float_module_that_does_not_fit_is_refused(small, calibration, tmp_path, wrong):
    backends.save(backends.quantize_static(small, calibration), tmp_path / "model")
    with pytest.raises(ValueError, match="do not fit"):
        backends.load(tmp_path / "model", model=wrong)


def test_unknown_engines_and_observers_are_refused_with_the_known_ones(small, calibration):
    with pytest.raises(ValueError, match="engine 'tpu'.*onednn"):
        backends.quantize_static(small, calibration, engine="tpu")
    with pytest.raises(ValueError, match="engine 'tpu'.*onednn"):
        backends.prepare_qat(small, engine="tpu")
    with pytest.raises(ValueError, match="observer 'mean'.*minmax, histogram"):
        backends.quantize_static(small, calibration, observer="mean")


def test_an_engine_that_does_not_run_here_says_why_and_what_does(small, calibration, monkeypatch):
    family = sys.modules["course_utils.backends.torch_ao"]
    found = [Engine("onednn", False, "not in this build of torch"), Engine("x86", True, "here")]
    monkeypatch.setattr(family, "engines", lambda: found)
    loaded, import_module = [], backends.importlib.import_module
    monkeypatch.setattr(backends.importlib, "import_module", lambda *a: loaded.append(a[0]) or import_module(*a))
    with pytest.raises(RuntimeError, match="'onednn' does not run here: not in this build of torch.*that do: x86"):
        backends.quantize_static(small, calibration, engine="onednn")
    assert set(loaded) == {".torch_ao"}, "what other engines there are takes seconds and their libraries to know"
    assert backends.default_engine() == "x86"


def test_an_engine_family_that_cannot_be_imported_is_a_sentence(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "course_utils.backends.torch_ao", None)
    found = [engine for engine in backends.engines() if engine.name in backends.FAMILIES["torch_ao"]]
    assert len(found) == 4 and not any(engine.runs for engine in found)
    assert all("not available" in engine.why for engine in found)
    with pytest.raises(RuntimeError, match="no integer engine runs on this machine.*not available"):
        backends.quantize_static(small, [])
    with pytest.raises(RuntimeError, match="not available"):
        backends.quantize_dynamic(small)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("libengine.so: cannot open shared object file\nmore lines"), "OSError: libengine.so: cannot open"),
        (PackageNotFoundError("engine"), "PackageNotFoundError: No package metadata was found for engine"),
        (ImportError("cannot import name 'Kernel'"), "ImportError: cannot import name 'Kernel'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_engine_family_that_cannot_say_what_it_has_is_a_sentence_too(monkeypatch, error, reason):
    def broken():
        raise error

    monkeypatch.setattr(sys.modules["course_utils.backends.torch_ao"], "engines", broken)
    found = backends.engines("torch_ao")
    assert len(found) == 4 and not any(engine.runs for engine in found)
    assert all(reason in engine.why and "more lines" not in engine.why for engine in found)


@pytest.mark.parametrize(("vnni", "expected"), [(True, "onednn"), (False, "x86")])
def test_without_vnni_the_default_engine_is_the_one_that_cannot_saturate(monkeypatch, vnni, expected):
    found = [Engine(n, True, "") for n in ("qnnpack", "x86", "onednn")]
    monkeypatch.setattr(backends, "_family_engines", {"torch_ao": found}.get)  # and no other family is asked
    monkeypatch.setattr(backends.cpu, "has_vnni", lambda: vnni)
    assert backends.default_engine() == expected


@pytest.mark.parametrize(("x86", "vnni", "needed"), [(True, True, False), (True, False, True), (False, False, False)])
def test_engines_that_may_saturate_get_headroom_by_default(monkeypatch, x86, vnni, needed):
    monkeypatch.setattr(backends.cpu, "is_x86", lambda: x86)
    monkeypatch.setattr(backends.cpu, "has_vnni", lambda: vnni)
    headroom = {name: backends.needs_headroom(name) for name in ("x86", "fbgemm", "onednn", "pt2e", "qnnpack")}
    assert headroom == {"x86": True, "fbgemm": True, "onednn": needed, "pt2e": needed, "qnnpack": False}


@pytest.mark.parametrize("engine", ["onednn", "x86", "fbgemm", "qnnpack"])
def test_the_range_is_the_engines_safe_one_unless_asked_otherwise(small, calibration, tmp_path, engine):
    need(engine)
    scales = {}
    for choice in (None, True, False):
        int8 = backends.quantize_static(small, calibration, engine=engine, reduce_range=choice)
        expected = backends.needs_headroom(engine) if choice is None else choice
        assert backends.recipe_of(int8)["reduce_range"] is expected
        backends.save(int8, tmp_path / "model")
        stored = load_file(tmp_path / "model")
        scales[choice] = stored["features.0.weight.scales"], stored["features_0_input_scale_0"]
        assert stored["features.0.weight"].abs().max() == (63 if expected else 127)
    torch.testing.assert_close(scales[True][0] / scales[False][0], torch.full_like(scales[True][0], 127.5 / 63))
    assert scales[True][1] == scales[False][1], "activations keep all of their bits"
    assert torch.equal(scales[None][0], scales[backends.needs_headroom(engine)][0])


def test_quantization_aware_training_keeps_to_the_same_range(small, images):
    for choice, most in ((True, 63), (False, 127)):
        prepared = backends.prepare_qat(small, reduce_range=choice)
        ends = {
            m.activation_post_process.quant_max for m in prepared.modules() if hasattr(m, "activation_post_process")
        }
        assert ends == {most, 255}  # of weights and of activations
        prepared(images)
        assert backends.recipe_of(backends.convert_qat(prepared))["reduce_range"] is choice


def test_calibration_without_images_is_refused(small):
    with pytest.raises(ValueError, match="calibration set is empty"):
        backends.quantize_static(small, [])


def test_only_what_was_quantized_can_be_saved(small, tmp_path):
    with pytest.raises(ValueError, match="SmallCNN was not made by quantize_dynamic"):
        backends.save(small, tmp_path / "model")
    with pytest.raises(ValueError, match="convert_qat"):
        backends.save(backends.prepare_qat(small), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_only_what_was_prepared_can_be_converted(small, calibration, images):
    with pytest.raises(ValueError, match="SmallCNN was not made by"):
        backends.convert_qat(small)
    with pytest.raises(ValueError, match="prepare_qat"):
        backends.convert_qat(backends.quantize_static(small, calibration))
    prepared = backends.prepare_qat(small)
    prepared(images)
    with pytest.raises(ValueError, match="prepare_qat"):
        backends.convert_qat(backends.convert_qat(prepared))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="model was not written by backends.save"):
        backends.load(path)
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        backends.load(path)
    with pytest.raises(FileNotFoundError):
        backends.load(tmp_path / "absent")


@pytest.mark.parametrize("share", [0, 0.0001, 0.5, 0.9999])
def test_a_truncated_file_is_refused(saved, tmp_path, share):
    content = saved.read_bytes()
    (tmp_path / "model").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="model is truncated.*save the model again"):
        backends.load(tmp_path / "model")


@pytest.fixture(scope="module")
def small_file(small, calibration, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model"
    backends.save(backends.quantize_static(small, calibration), path)
    return path


def test_any_changed_byte_is_noticed(small_file, tmp_path):
    content = small_file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in (*range(0, header, 41), *range(header, len(content), 7)):
        changed = bytearray(content)
        changed[position] ^= 1
        (tmp_path / "model").write_bytes(changed)
        with pytest.raises(
            ValueError, match="save the model again|was not written by backends.save|version of the course"
        ):
            backends.load(tmp_path / "model", model=SmallCNN())


def test_a_changed_weight_is_named_with_what_to_do(small_file, tmp_path):
    changed = bytearray(small_file.read_bytes())
    changed[-1] ^= 1
    (tmp_path / "model").write_bytes(changed)
    with pytest.raises(ValueError, match="model is damaged.*checksum.*Copy it again from where it came, or save"):
        backends.load(tmp_path / "model", model=SmallCNN())


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("squeeze-int8-3", "a newer version of the course.*'squeeze-int8-3'.*update the course"),
        ("squeeze-int8-10", "newer version of the course"),
        ("squeeze-int8-1", "an older version of the course.*'squeeze-int8-1'.*quantize the model again"),
        ("other-2", "not written by backends.save"),
    ],
)
def test_a_file_of_another_version_says_so(small, calibration, tmp_path, monkeypatch, format, expected):
    with monkeypatch.context() as later:
        later.setattr(backends, "FORMAT", format)
        backends.save(backends.quantize_static(small, calibration), tmp_path / "model")
    with pytest.raises(ValueError, match=expected):
        backends.load(tmp_path / "model", model=SmallCNN())


@pytest.mark.parametrize(
    ("key", "value"), [("stride", (1, 1)), ("padding", (1, 1)), ("dilation", (2, 2)), ("padding_mode", "reflect")]
)
def test_a_float_module_with_the_same_weights_and_another_geometry_is_refused(small_file, key, value):
    other = SmallCNN()
    setattr(other.features[0], key, value)
    with pytest.raises(ValueError, match=rf"do not fit this SmallCNN: features.0 has {key} .*Pass the architecture"):
        backends.load(small_file, model=other)


def test_a_float_module_with_another_activation_is_refused(small_file):
    other = SmallCNN()
    other.features[2] = nn.ReLU6()
    with pytest.raises(ValueError, match="features.2 has class ReLU6, and had ReLU"):
        backends.load(small_file, model=other)


def test_an_interrupted_save_keeps_the_old_file(int8, tmp_path, monkeypatch):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    (tmp_path / "model").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        backends.save(int8, tmp_path / "model")
    assert [path.read_text() for path in tmp_path.glob("model*")] == ["old"]


def test_the_file_says_how_the_model_was_made(saved):
    content = saved.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    recipe = json.loads(header["__metadata__"]["course"])["recipe"]
    assert recipe == {
        "kind": "static",
        "engine": backends.default_engine(),
        "per_channel": True,
        "observer": "minmax",
        "reduce_range": backends.needs_headroom(backends.default_engine()),
        "architecture": {"name": "resnet18", "num_classes": 10},
    }


# The same numbers in float arithmetic, and kernels that do otherwise -----------------------------------------------------


def test_the_float_reference_is_close_to_torchs_own(resnet18, calibration, images):
    need("onednn")
    with torch_ao._quietly("onednn"):
        prepared = prepare_fx(copy.deepcopy(resnet18), get_default_qconfig_mapping("onednn"), (images,))
        outputs(prepared, images)
        theirs, converted = convert_to_reference_fx(copy.deepcopy(prepared)), convert_fx(prepared)
        expected = outputs(theirs, images)
    found = FloatModel(torch_ao.steps(converted))(images)
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_every_layer_of_the_float_reference_is_within_one_of_the_integers(mobilenet_v2, calibration, images):
    int8 = backends.quantize_static(mobilenet_v2, calibration)
    floats, integers = backends.reference(int8), integer.IntegerModel(int8)
    values, meaning = {"": images}, {step.name: step.output for step in integers.steps}
    for step in integers.steps[:-1]:
        before = [values[name] for name in step.inputs or ("",)]
        values[step.name] = integers.run(step, *before)
        reals = [affine.dequantize(q, meaning[name]) for q, name in zip(before, step.inputs, strict=False)] or before
        found = affine.quantize(floats.run(step, *reals), step.output)
        difference = (found.int() - values[step.name].int()).abs()
        assert difference.max() <= 1 and (difference == 0).double().mean() > 0.99, step.name


def test_the_float_reference_needs_a_statically_quantized_model(resnet18):
    with pytest.raises(ValueError, match="ResNet was not made by"):
        backends.reference(resnet18)
    with pytest.raises(ValueError, match="only statically quantized"):
        backends.reference(backends.quantize_dynamic(resnet18))
    with pytest.raises(ValueError, match="step a: fold has no counterpart in float arithmetic"):
        FloatModel([integer.Step("a", "fold")])


class Keywords(nn.Module):
    """A network that passes arguments by keyword."""

    def __init__(self, **flatten):
        super().__init__()
        self.conv, self.head, self.flatten = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 10), flatten

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.conv(x), output_size=1)
        return self.head(torch.flatten(x, **self.flatten))


def test_arguments_by_keyword_are_read(images):
    torch.manual_seed(0)
    int8 = backends.quantize_static(Keywords(start_dim=1).eval(), [images])
    expected = outputs(int8, images)
    for found in (integer.IntegerModel(int8)(images), backends.reference(int8)(images)):
        assert found.shape == (8, 10) and (found - expected).norm() < 0.05 * expected.norm()


def test_flattening_to_another_dimension_than_the_last_is_refused(images):
    model = nn.Sequential(Keywords(start_dim=1, end_dim=2))
    model[0].head = nn.Linear(1, 10)
    int8 = backends.quantize_static(model.eval(), [images])
    for make in (integer.IntegerModel, backends.reference):
        with pytest.raises(ValueError, match="flatten with end_dim=2 has no counterpart.*end_dim=-1"):
            make(int8)


def depthwise(channels):
    """A network whose one 3 × 3 convolution has as many groups as channels, with the largest weights all over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1, groups=channels))
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.sign())
    return model.eval()


def lost_by_taps(step, q, zero_point):
    """What fbgemm's depthwise kernels lose: they pair neighbouring taps of a channel, where others pair channels."""
    weight, geometry = step.options["weight"], [step.options[key] for key in ("stride", "padding", "dilation")]
    patches, height, width = integer._patches(q.int(), weight.shape[2:], *geometry, fill=zero_point)
    as_channels = patches.permute(0, 2, 1).reshape(len(q), -1, height, width)
    return integer.PairSaturation(weight.flatten(1)[:, :, None, None], groups=len(weight))(as_channels, zero_point)


def compare_depthwise(channels, engine, reduce_range, images):
    """Return the integers of the depthwise layer on the same input: `(kernel, exact, saturating)`."""
    need(engine)
    int8 = backends.quantize_static(depthwise(channels), [images], engine=engine, reduce_range=reduce_range)
    model, kernel = integer.IntegerModel(int8), backends.integers(int8, images)
    step = next(step for step in model.steps if step.options.get("groups", 1) > 1)
    source = next(s.output for s in model.steps if s.name == step.inputs[0])
    q, zero_point = kernel[step.inputs[0]], int(source.zero_point)
    scale = source.scale.double() * step.options["weight_scale"].double()
    geometry = {key: step.options[key] for key in ("stride", "padding", "dilation", "groups")}
    bias = integer.quantize_bias(step.options["bias"], scale)
    acc = integer.conv2d_accumulate(q, step.options["weight"], bias, zero_point, **geometry)
    m0, shift = (part.reshape(-1, 1, 1) for part in integer.quantize_multiplier(scale / step.output.scale.double()))
    acc = acc - lost_by_taps(step, q, zero_point)
    saturating = integer.requantize(acc, m0, shift, int(step.output.zero_point), 0, 255)
    return kernel[step.name].int(), model.run(step, q).int(), saturating.int()


@pytest.mark.parametrize("engine", ["fbgemm", "x86"])
def test_depthwise_kernels_of_fbgemm_saturate_pairs_of_taps_whatever_the_processor(engine, images):
    kernel, exact, saturating = compare_depthwise(128, engine, False, images)
    assert (kernel - exact).abs().max() > 10
    assert (kernel - saturating).abs().max() <= 1


@pytest.mark.parametrize("engine", ["fbgemm", "x86"])
def test_their_safe_default_is_exact(engine, images):
    kernel, exact, saturating = compare_depthwise(128, engine, None, images)
    assert (kernel - exact).abs().max() <= 1 and torch.equal(exact, saturating)


def test_x86_hands_up_to_100_groups_to_onednn_where_there_is_vnni(images):
    if "avx512_vnni" not in cpu.flags():
        pytest.skip("this processor has no AVX512-VNNI")
    kernel, exact, saturating = compare_depthwise(96, "x86", False, images)
    assert (kernel - exact).abs().max() <= 1 and not torch.equal(exact, saturating)


def test_qnnpack_is_exact_on_all_8_bits(images):
    kernel, exact, saturating = compare_depthwise(128, "qnnpack", None, images)
    assert (kernel - exact).abs().max() <= 1 and not torch.equal(exact, saturating)
