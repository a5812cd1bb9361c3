import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from course_utils import backends, data, measure, qat
from course_utils.backends import Engine
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
    assert (found - expected).norm() < 0.05 * expected.norm()


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
    backends.quantize_static(model, calibration)
    backends.quantize_dynamic(model)
    backends.prepare_qat(model)
    assert fingerprint(model) == before and all(m.training for m in model.modules())


def test_learners_see_no_warnings(small, calibration, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        int8 = backends.quantize_static(small, calibration)
        backends.save(int8, tmp_path / "model")
        backends.load(tmp_path / "model", model=SmallCNN())


def test_the_ranges_come_from_all_calibration_batches(small, images):
    def scale_of(batches):
        return outputs(backends.quantize_static(small, batches), images)

    both = scale_of([images, 10 * images])
    assert torch.equal(both, scale_of([10 * images, images])) and not torch.equal(both, scale_of([images]))
    assert torch.equal(both, scale_of((x, None) for x in (images, 10 * images)))  # labels are not looked at


@pytest.mark.parametrize("options", [{"per_channel": False}, {"observer": "histogram"}, {"engine": "x86"}])
def test_other_ways_to_quantize_work_and_survive_the_file(small, calibration, images, tmp_path, options):
    if not next(e.runs for e in backends.engines() if e.name == options.get("engine", backends.default_engine())):
        pytest.skip("this engine does not run on this machine")
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
    qat.finetune(prepared, some, steps=2, batch_size=8)
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
    with pytest.raises(RuntimeError, match="'onednn' does not run here: not in this build of torch.*that do: x86"):
        backends.quantize_static(small, calibration, engine="onednn")
    assert backends.default_engine() == "x86"


def test_an_engine_family_that_cannot_be_imported_is_a_sentence(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "course_utils.backends.torch_ao", None)
    assert not any(engine.runs for engine in backends.engines())
    assert all("not available" in engine.why for engine in backends.engines())
    with pytest.raises(RuntimeError, match="no integer engine runs on this machine.*not available"):
        backends.quantize_static(small, [])
    with pytest.raises(RuntimeError, match="not available"):
        backends.quantize_dynamic(small)


@pytest.mark.parametrize(("vnni", "expected"), [(True, "onednn"), (False, "x86")])
def test_without_vnni_the_default_engine_is_the_one_that_cannot_saturate(monkeypatch, vnni, expected):
    monkeypatch.setattr(backends, "engines", lambda: [Engine(n, True, "") for n in ("qnnpack", "x86", "onednn")])
    monkeypatch.setattr(backends.cpu, "has_vnni", lambda: vnni)
    assert backends.default_engine() == expected


def test_x86_leaves_one_bit_of_headroom(small, calibration, tmp_path):
    if not next(e.runs for e in backends.engines() if e.name == "x86"):
        pytest.skip("this engine does not run on this machine")
    zero_points = {}
    for engine in ("x86", "onednn"):
        backends.save(backends.quantize_static(small, calibration, engine=engine), tmp_path / engine)
        zero_points[engine] = load_file(tmp_path / engine)["features_0_input_zero_point_0"]
    assert int(zero_points["x86"]) <= 127 and abs(int(zero_points["onednn"]) - 2 * int(zero_points["x86"])) <= 1


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
        "architecture": {"name": "resnet18", "num_classes": 10},
    }
