"""Networks compiled by Inductor: float ones, and PT2E's quantized ones, with the kernels that they end in."""

import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from course_utils import backends, models
from course_utils.backends import inductor
from tests.engines import need, relative_error


class Small(nn.Module):
    """Convolutions, an addition and a linear layer: quick to compile, and not so small that Inductor multiplies without oneDNN."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.second = nn.Conv2d(32, 32, 3, 1, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.first(x)
        x = (x + self.second(x)).relu()
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, (1, 1)), 1))


def kernels(model, images):
    """Return how often each operation of oneDNN ran: name → count."""
    with torch.profiler.profile() as profile:
        model(images)
    return Counter(
        {e.key: e.count for e in profile.key_averages() if e.key.startswith(("onednn::", "mkldnn::_", "aten::conv"))}
    )


@pytest.fixture(scope="module")
def small():
    need("inductor")
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def fp32(small):
    return backends.deploy(small, engine="inductor", image_shape=(3, 32, 32))


@pytest.fixture(scope="module")
def int8(small, calibration):
    need("pt2e-inductor")
    return backends.quantize_static(small, calibration, engine="pt2e-inductor")


def test_a_compiled_network_computes_the_same(small, fp32, images):
    with torch.no_grad():
        expected = small(images)
    found = fp32(images)
    assert found.dtype == torch.float32 and not found.requires_grad and relative_error(found, expected) < 1e-5
    for n in (1, 7):
        assert relative_error(fp32(images[:n]), expected[:n]) < 1e-5
    assert not hasattr(images, "_dynamo_dynamic_indices"), "the caller's tensor was marked"


def test_inputs_need_not_be_images():
    need("inductor")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
    deployed = backends.deploy(model, engine="inductor", image_shape=(16,))
    for n in (1, 3):
        assert relative_error(deployed(x[:n]), expected[:n]) < 1e-5


def test_its_weights_are_frozen_into_onednns_layout(fp32, images):
    fp32(images[:1])
    found = kernels(fp32, images[:1])
    assert sum(count for name, count in found.items() if "_convolution_pointwise" in name) == 2
    assert not [name for name in found if name.startswith("aten::conv")]


def test_bfloat16_is_a_little_less_exact(small, images):
    bf16 = backends.deploy(small, engine="inductor", precision="bf16", image_shape=(3, 32, 32))
    with torch.no_grad():
        expected = small(images[:1])
    assert bf16(images[:1]).dtype == torch.float32
    assert 1e-4 < relative_error(bf16(images[:1]), expected) < 0.03


def test_images_of_another_size_are_refused(fp32, int8, images):
    with pytest.raises(ValueError, match=r"\(3, 32, 32\), got \(3, 16, 16\): engine 'inductor'"):
        fp32(images[:, :, :16, :16])
    with pytest.raises(ValueError, match=r"\(3, 32, 32\), got \(3, 16, 16\): engine 'pt2e-inductor'"):
        int8(images[:, :, :16, :16])


def test_compiling_a_quantized_network_runs_onednns_integer_kernels(int8, images):
    int8(images[:1])
    found = kernels(int8, images[:1])
    assert sum(count for name, count in found.items() if "qconv" in name) == 2
    assert sum(count for name, count in found.items() if "qlinear" in name) == 1
    assert not [name for name in found if name.startswith("aten::conv")]


def test_its_numbers_are_those_of_pt2e_and_survive_the_file(small, int8, calibration, images, tmp_path):
    expected = backends.quantize_static(small, calibration, engine="pt2e")
    for n in (8, 1, 7):
        assert relative_error(int8(images[:n]), expected(images[:n])) < 0.01
    backends.save(int8, tmp_path / "model")
    loaded = backends.load(tmp_path / "model", model=Small())
    assert backends.recipe_of(loaded)["engine"] == "pt2e-inductor"
    assert torch.equal(loaded(images), int8(images))
    reference = backends.reference(int8)(images)
    assert relative_error(reference, int8(images)) < 0.01


def test_a_trained_network_is_compiled_too(small, images):
    need("pt2e-inductor")
    prepared = backends.prepare_qat(small, engine="pt2e-inductor", image_shape=(3, 32, 32))
    prepared(images)
    converted = backends.convert_qat(prepared)
    with torch.no_grad():
        fake = prepared.eval()(images)
    assert relative_error(converted(images), fake) < 0.05


def test_a_float_network_on_torch_itself_has_no_file(fp32, tmp_path):
    with pytest.raises(ValueError, match="'inductor' has no file of its own: save the float network"):
        backends.save(fp32, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_learners_see_no_warnings(small, calibration, images, capfd):
    torch._dynamo.reset()
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.quantize_static(small, calibration, engine="pt2e-inductor")(images[:1])
    assert capfd.readouterr() == ("", "")


def test_without_a_compiler_it_says_which_to_install(small, calibration, monkeypatch):
    monkeypatch.setattr(inductor.shutil, "which", lambda name: None)
    found = {engine.name: engine for engine in backends.engines("inductor", "pt2e")}
    for name in ("inductor", "pt2e-inductor"):
        assert not found[name].runs and "no" not in found[name].name
    assert "apt install g++" in found["inductor"].why
    with pytest.raises(RuntimeError, match="'inductor' does not run here: .*C.. compiler.*install g.. "):
        backends.deploy(small, engine="inductor")
    with pytest.raises(RuntimeError, match="'pt2e-inductor' does not run here"):
        backends.quantize_static(small, calibration, engine="pt2e-inductor")


def test_a_compiler_that_fails_is_explained(fp32, small, images):
    def broken(images):
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("Python.h: No such file"), None)

    model = backends.deploy(small, engine="inductor", image_shape=(3, 32, 32))
    model.compiled = (broken,)
    with pytest.raises(RuntimeError, match=r"could not make a program.*apt install g\+\+ python3-dev"):
        model(images)


def test_resnet18_runs_12_and_8_and_1_integer_kernels():
    need("pt2e-inductor")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    int8 = backends.quantize_static(models.load("resnet18"), [images], engine="pt2e-inductor")
    int8(images[:1])
    found = kernels(int8, images[:1])
    assert found["onednn::qconv_pointwise"] == 12 and found["onednn::qlinear_pointwise"] == 1
    assert sum(count for name, count in found.items() if "qconv2d_pointwise" in name) == 8
