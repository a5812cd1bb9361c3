"""Float networks on torch itself, and what `deploy` accepts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from course_utils import backends, simulate
from course_utils.simulate import Policy
from tests.conftest import fingerprint
from tests.engines import hide, relative_error
from tests.test_backends_pt2e import Block

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp32", 0, 1e-5), ("bf16", 1e-4, 0.03), ("fp16", 1e-5, 0.005)]
)
def test_eager_torch_in_each_precision_is_as_exact_as_its_type(block, images, precision, least, most):
    before = fingerprint(block)
    model = backends.deploy(block, engine="torch", precision=precision)
    with torch.no_grad():
        expected = block(images)
    found = model(images)
    assert found.dtype == torch.float32 and not found.requires_grad and not model.training
    assert least <= relative_error(found, expected) < most
    assert relative_error(model(images[:1]), found[:1]) < 1e-2
    assert model(torch.zeros(2, 3, 48, 48)).shape == (2, 10), "eager torch takes images of any size"
    assert fingerprint(block) == before and all(
        p.requires_grad and p.dtype == torch.float32 for p in block.parameters()
    )


def test_its_batch_norms_are_folded_and_its_weights_channels_last(block):
    network = backends.deploy(block, engine="torch", precision="bf16").network
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
    assert network.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("first", "shape"),
    [(nn.Linear(6, 8), (6,)), (nn.Conv1d(2, 4, 3), (2, 8)), (nn.Conv3d(1, 2, 3), (1, 5, 5, 5))],
    ids=["linear", "Conv1d", "Conv3d"],
)
def test_inputs_need_not_be_images(first, shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten()).eval()
    with torch.no_grad():
        expected = model(x)
    assert relative_error(backends.deploy(model, engine="torch", image_shape=shape)(x), expected) < 1e-5
    assert (
        relative_error(backends.deploy(model, engine="torch", precision="bf16", image_shape=shape)(x), expected) < 0.03
    )


def test_how_it_was_made_can_be_asked(resnet18):
    recipe = backends.recipe_of(backends.deploy(resnet18, engine="torch", precision="bf16"))
    architecture = {"name": "resnet18", "num_classes": 10}
    assert recipe == {"kind": "deployed", "engine": "torch", "precision": "bf16", "architecture": architecture}


def test_what_there_is_not_is_refused_with_what_there_is(block, calibration):
    with pytest.raises(ValueError, match="unknown engine 'tpu': deploy has torch, inductor, onnxruntime"):
        backends.deploy(block, engine="tpu")
    with pytest.raises(ValueError, match="'onnxruntime' has no precision 'bf16' here.*openvino: fp32, bf16, int8"):
        backends.deploy(block, engine="onnxruntime", precision="bf16")
    with pytest.raises(ValueError, match="networks of simulate.quantize or qat.convert.*quantize_static"):
        backends.deploy(block, engine="openvino", precision="int8")
    quantized = simulate.quantize(block, Policy(8, 8), calibration)
    with pytest.raises(ValueError, match="rounds to few bits already.*precision='int8', not 'fp32'"):
        backends.deploy(quantized, engine="openvino")
    with pytest.raises(ValueError, match="was made for engine 'torch' and stays there"):
        backends.deploy(backends.deploy(block, engine="torch"), engine="torch")


def test_float_engines_do_not_quantize_and_have_no_file(block, calibration, tmp_path):
    with pytest.raises(ValueError, match="'torch' runs float networks only: use deploy"):
        backends.quantize_static(block, calibration, engine="torch")
    with pytest.raises(ValueError, match="'torch' has no file of its own"):
        backends.save(backends.deploy(block, engine="torch"), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_deployed_model_is_not_taken_for_a_quantized_one(block):
    with pytest.raises(ValueError, match="only statically quantized models.*'deployed'"):
        backends.reference(backends.deploy(block, engine="torch"))


def test_importing_the_backends_imports_no_engine():
    program = (
        "import sys; from course_utils import backends\n"
        "heavy = ('torchao', 'onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf', 'executorch', 'tensorrt')\n"
        "print([name for name in (*heavy, 'torch._inductor.compile_fx') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_every_engine_is_named_whatever_is_installed(monkeypatch):
    for family in ("onnxruntime", "openvino", "executorch", "pt2e"):
        hide(monkeypatch, family, family, "torchao")
    found = {engine.name: engine for engine in backends.engines()}
    assert list(found) == [name for names in backends.FAMILIES.values() for name in names]
    absent = [name for name in ("onnxruntime", "openvino", "executorch", "pt2e", "pt2e-inductor") if found[name].runs]
    assert not absent and found["torch"].runs
    assert all("not available" in found[name].why for name in ("onnxruntime", "openvino", "executorch"))
