"""Engine pt2e: the same interface as the others, on torchao; without it, a sentence."""

import gc
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.ops import StochasticDepth

from course_utils import affine, backends, integer, measure, qat
from tests.conftest import fingerprint

ROOT = Path(__file__).resolve().parents[1]


class Block(nn.Module):
    """All that ResNet18 and MobileNetV2 are made of, in small: one ReLU called twice, too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.last = nn.Conv2d(16, 16, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 10))

    def forward(self, x):
        x = self.pool(self.relu(self.stem(x)))
        x = x + self.last(self.deep(x))
        return self.head(self.relu(x))


def outputs(model, images):
    with torch.no_grad():
        return model(images)


def quantize_resnet18():
    """For a process of its own, to see how much memory it takes."""
    from course_utils import data, models

    calibration = data.batches(data.fashion_mnist("calibration"), 32, limit=64)
    int8 = backends.quantize_static(models.load("resnet18"), calibration, engine="pt2e")
    for images, _ in data.batches(data.fashion_mnist("validation"), 100, limit=200):
        int8(images)


@pytest.fixture(scope="module")
def runs():
    """Skip the tests that need the engine where it does not run."""
    found = next(engine for engine in backends.engines() if engine.name == "pt2e")
    if not found.runs:
        pytest.skip(found.why)


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def int8(runs, block, calibration):
    return backends.quantize_static(block, calibration, engine="pt2e")


@pytest.fixture(scope="module")
def saved(int8, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2e") / "block.safetensors"
    assert backends.save(int8, path) == path.stat().st_size
    return path


def test_without_torchao_the_engine_is_a_sentence_and_the_others_run(block, calibration, monkeypatch):
    monkeypatch.delitem(sys.modules, "course_utils.backends.pt2e", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"] or ["torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    found = {engine.name: engine for engine in backends.engines()}
    assert not found["pt2e"].runs and any(engine.runs for engine in found.values())
    assert "not available" in found["pt2e"].why and "make setup ENGINES=1" in found["pt2e"].why
    with pytest.raises(RuntimeError, match="'pt2e' does not run here: .*ENGINES=1.*that do: "):
        backends.quantize_static(block, calibration, engine="pt2e")
    backends.quantize_static(block, calibration)


def test_a_torchao_that_does_not_load_is_a_sentence_too(monkeypatch):
    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "torchao":
                raise OSError("undefined symbol: _Z3foo\nmore lines")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "course_utils.backends.pt2e", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    found = next(engine for engine in backends.engines() if engine.name == "pt2e")
    assert not found.runs and "undefined symbol: _Z3foo" in found.why and "more lines" not in found.why


@pytest.mark.parametrize(("machine", "onednn", "why"), [("aarch64", True, "x86"), ("x86_64", False, "no oneDNN")])
def test_a_machine_it_cannot_serve_is_told_so(runs, monkeypatch, machine, onednn, why):
    monkeypatch.setattr(backends.cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    found = backends.pt2e.engines()
    assert [engine.runs for engine in found] == [False, False] and all(why in engine.why for engine in found)


def test_every_layer_became_a_kernel_with_its_activation_inside(int8):
    graph = int8.graphs[1].graph
    kernels = [str(node.target) for node in graph.nodes if str(node.target).startswith("onednn.")]
    assert len(kernels) == 4 and sum("binary" in kernel for kernel in kernels) == 1
    left = {str(node.target) for node in graph.nodes if str(node.target).startswith("aten.")}
    assert not [name for name in left if any(word in name for word in ("conv", "add", "relu", "hardtanh", "clamp"))]


def test_logits_are_close_to_the_float_ones_and_need_no_switches(block, int8, images):
    found = int8.eval()(images)  # gradients are on: the engine has none
    assert found.dtype == torch.float32 and not found.requires_grad and not int8.training
    assert (found - outputs(block, images)).norm() < 0.05 * found.norm()


def test_the_float_reference_computes_the_same(int8, images):
    expected, found = int8(images), backends.reference(int8)(images)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_the_same_integers_as_the_other_engines(block, int8, calibration, saved, tmp_path):
    backends.save(backends.quantize_static(block, calibration, engine="onednn"), tmp_path / "model")
    ours, theirs = load_file(saved), load_file(tmp_path / "model")
    for name in ("stem.0.weight", "deep.0.weight", "last.weight"):
        difference = (ours[name].int() - theirs[name].int()).abs()
        assert difference.max() <= 1 and (difference == 0).double().mean() > 0.99
        assert torch.allclose(ours[f"{name}.scales"], theirs[f"{name}.scales"])


def test_any_number_of_images_gives_each_its_own_logits(int8, images):
    together = int8(images)
    for n in (1, 3, 8):
        assert torch.equal(int8(images[:n]), together[:n])
    assert torch.equal(int8(torch.cat([images, images])), torch.cat([together, together]))


def test_a_calibration_set_of_single_images_fixes_nothing(runs, block, images):
    int8 = backends.quantize_static(block, images.split(1), engine="pt2e")
    assert int8(images).shape == (8, 10)


def test_images_of_another_size_are_refused(int8, images):
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\), got \(3, 16, 16\).*quantize again"):
        int8(images[:, :, :16, :16])


def test_a_reloaded_model_gives_identical_outputs(int8, saved, images, tmp_path):
    loaded = backends.load(saved, model=Block())
    assert torch.equal(loaded(images), int8(images)) and torch.equal(loaded(images[:1]), int8(images[:1]))
    assert backends.recipe_of(loaded) == backends.recipe_of(int8)
    backends.save(loaded, tmp_path / "again")
    assert tmp_path.joinpath("again").read_bytes() == saved.read_bytes()


def test_a_fresh_process_gives_identical_outputs_and_says_nothing(int8, saved, images, tmp_path):
    save_file({"images": images.contiguous()}, tmp_path / "in")
    program = (
        "import sys, torch; from safetensors.torch import load_file, save_file; from course_utils import backends\n"
        "from tests.test_backends_pt2e import Block\n"
        "x = load_file(sys.argv[2])['images'].contiguous(memory_format=torch.channels_last)\n"
        "save_file({'logits': backends.load(sys.argv[1], model=Block())(x)}, sys.argv[3])"
    )
    command = [sys.executable, "-c", program, saved, tmp_path / "in", tmp_path / "out"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")
    assert torch.equal(load_file(tmp_path / "out")["logits"], int8(images))


def test_the_file_holds_integers_under_the_names_of_the_layers(saved):
    tensors = load_file(saved)
    assert tensors["stem.0.weight"].dtype == tensors["head.3.weight"].dtype == torch.int8
    assert tensors["stem.0.weight.scales"].shape == (16,) and tensors["deep.0.bias"].shape == (16,)
    assert {name.rpartition(".")[0] for name in tensors} >= {"stem.0", "deep.0", "last", "head.3", "activations"}
    assert not [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1]


def test_a_float_module_that_does_not_fit_is_refused(saved):
    other = Block()
    other.last = nn.Conv2d(16, 16, 1, groups=2)
    with pytest.raises(ValueError, match="do not fit this Block: last has groups 2"):
        backends.load(saved, model=other)
    other = Block()
    other.head[3] = nn.Linear(16, 11)
    with pytest.raises(ValueError, match="do not fit this Block.*head.3"):
        backends.load(saved, model=other)


def test_a_damaged_file_is_refused(saved, tmp_path):
    changed = bytearray(saved.read_bytes())
    changed[-3] ^= 4
    (tmp_path / "model").write_bytes(changed)
    with pytest.raises(ValueError, match="is damaged.*checksum"):
        backends.load(tmp_path / "model", model=Block())


def test_other_ways_to_quantize_work_and_survive_the_file(runs, block, int8, calibration, images, tmp_path):
    other_range = {"reduce_range": not backends.needs_headroom("pt2e")}
    for options in ({"per_channel": False}, {"observer": "histogram"}, other_range):
        other = backends.quantize_static(block, calibration, engine="pt2e", **options)
        assert options.items() <= backends.recipe_of(other).items()
        assert not torch.equal(other(images), int8(images))
        overflows = not options.get("reduce_range", True)  # asked for only where the default leaves headroom
        assert overflows or (other(images) - int8(images)).norm() < 0.1 * int8(images).norm()
        backends.save(other, tmp_path / "model")
        assert torch.equal(backends.load(tmp_path / "model", model=Block())(images), other(images))


def test_one_scale_a_tensor_is_the_same_for_each_channel(runs, block, calibration, tmp_path):
    backends.save(backends.quantize_static(block, calibration, engine="pt2e", per_channel=False), tmp_path / "model")
    assert len(load_file(tmp_path / "model")["stem.0.weight.scales"].unique()) == 1


def test_quantizing_leaves_the_float_model_alone_and_says_nothing(runs, calibration):
    model = Block().train()
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.quantize_static(model, calibration, engine="pt2e")
    assert fingerprint(model) == before and all(m.training for m in model.modules())


def test_calibration_without_images_is_refused(runs, block):
    with pytest.raises(ValueError, match="calibration set is empty"):
        backends.quantize_static(block, [], engine="pt2e")


def test_what_it_cannot_do_it_says(int8, images):
    with pytest.raises(ValueError, match="unrounded sums after conv2d.*no integer counterpart"):
        integer.IntegerModel(int8)
    with pytest.raises(ValueError, match="unrounded sums"):
        backends.integers(int8, images)


@pytest.mark.parametrize(
    "options", [{}, {"per_channel": False}, {"reduce_range": True}], ids=["default", "per tensor", "headroom"]
)
def test_a_network_trained_with_fake_quantizers_becomes_integers_that_agree(runs, block, images, tmp_path, options):
    shape = tuple(images.shape[1:])
    prepared = backends.prepare_qat(block, engine="pt2e", image_shape=shape, **options)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    before = [p.detach().clone() for p in prepared.parameters()]
    for step in range(6):
        if step == 4:
            qat.freeze(prepared)
            buffers = {k: v.clone() for k, v in prepared.named_buffers() if k.endswith(("running_mean", "max_val"))}
        optimizer.zero_grad()
        prepared(images).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, prepared.parameters(), strict=True) if a.abs().max() > 0)
    weight_ranges = [k for k in buffers if not torch.equal(buffers[k], dict(prepared.named_buffers())[k])]
    assert not weight_ranges, "frozen, nothing moves"

    fingerprint_before = fingerprint(prepared)
    converted = backends.convert_qat(prepared)
    assert fingerprint(prepared) == fingerprint_before
    fake, real = outputs(prepared.eval(), images), outputs(converted, images)
    assert (fake - real).abs().max() < 0.05 * fake.abs().max()
    torch.testing.assert_close(
        outputs(backends.reference(converted), images), fake, rtol=0, atol=0.05 * float(fake.abs().max())
    )

    backends.save(converted, tmp_path / "trained.safetensors")
    loaded = backends.load(tmp_path / "trained.safetensors", model=block)
    assert torch.equal(outputs(loaded, images), real)
    assert backends.recipe_of(loaded)["kind"] == "qat"


def test_dropout_and_batch_norm_of_an_exported_network_follow_its_mode(runs, block, images):
    prepared = backends.prepare_qat(block, engine="pt2e", image_shape=tuple(images.shape[1:]))
    outputs(prepared, images)
    prepared.eval()
    statistics = {k: v.clone() for k, v in prepared.named_buffers() if "running" in k}
    assert "True" not in "".join(str(node.args) for node in prepared.graph.graph.nodes if "dropout" in node.name)
    outputs(prepared, images)
    assert all(torch.equal(v, dict(prepared.named_buffers())[k]) for k, v in statistics.items())
    prepared.train()
    assert not torch.equal(outputs(prepared, images), outputs(prepared, images))
    assert not all(torch.equal(v, dict(prepared.named_buffers())[k]) for k, v in statistics.items())


def with_in_the_middle(module):
    """Return a small network with `module` after its convolution."""
    torch.manual_seed(0)
    ends = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(ends[0], module, ends[1], nn.Linear(16, 10))


@pytest.mark.parametrize(
    "dropout", [nn.Dropout(), nn.Dropout2d(), nn.Dropout2d(inplace=True), nn.AlphaDropout()], ids=str
)
def test_every_kind_of_dropout_drops_in_training_only(runs, images, dropout):
    prepared = backends.prepare_qat(with_in_the_middle(dropout), engine="pt2e", image_shape=(3, 32, 32))
    assert not torch.equal(outputs(prepared, images), outputs(prepared, images))
    prepared.disable_observer()
    prepared.eval()
    fake = outputs(prepared, images)
    assert torch.equal(outputs(prepared, images), fake)
    converted = backends.convert_qat(prepared)
    assert torch.equal(outputs(converted, images), outputs(converted, images))
    for found in (outputs(converted, images), backends.reference(converted)(images)):
        assert (found - fake).norm() < 0.05 * fake.norm()


def test_what_else_is_drawn_at_random_in_training_is_refused(runs, images):
    model = with_in_the_middle(StochasticDepth(0.5, "row"))
    with pytest.raises(ValueError, match=r"random numbers in training by aten.bernoulli.*p = 0.0.*course_utils.qat"):
        backends.prepare_qat(model, engine="pt2e", image_shape=(3, 32, 32))
    int8 = backends.quantize_static(model, [images], engine="pt2e")
    assert torch.equal(int8(images), int8(images)), "without training there is nothing to refuse"
    model[1].p = 0.0
    assert backends.prepare_qat(model, engine="pt2e", image_shape=(3, 32, 32))(images).shape == (8, 10)


def test_the_reference_flattens_to_the_last_dimension_or_not_at_all(runs, images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(1, 2), nn.Linear(30, 10))
    with pytest.raises(ValueError, match="flatten with end_dim=2 has no counterpart.*end_dim=-1"):
        backends.reference(backends.quantize_static(model, [images], engine="pt2e"))


def test_resnet18_is_a_quarter_of_its_float_file_and_leaves_no_float_copy_behind(runs, resnet18, calibration, images):
    def float_bytes():
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.dtype == torch.float32]
        return sum(tensor.nbytes for tensor in tensors)

    before = float_bytes()
    int8 = backends.quantize_static(resnet18, calibration, engine="pt2e")
    assert float_bytes() - before < 2**20
    assert affine.sqnr(outputs(resnet18, images), int8(images)) > 20
    assert measure.size_on_disk(resnet18) / measure.size_on_disk(int8) == pytest.approx(4, abs=0.05)


def test_a_process_that_quantizes_resnet18_stays_small(runs):
    assert measure.peak_memory(quantize_resnet18).total < 1.4 * 2**30


def test_only_kinds_of_convolutions_that_are_there_are_looked_for(runs, monkeypatch):
    family, looked = sys.modules["course_utils.backends.pt2e"], []

    def look(graph, convolution):
        looked.append(convolution)
        return graph

    monkeypatch.setattr(family.qat_utils, "_fold_conv_bn_qat_helper", look)
    graph = torch.export.export(nn.Conv2d(3, 4, 1), (torch.zeros(1, 3, 4, 4),)).module()
    kinds = nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv_transpose2d
    with family._only_convolutions_that_are_there():
        assert all(family.qat_utils._fold_conv_bn_qat_helper(graph, kind) is graph for kind in kinds)
    assert looked == [nn.functional.conv2d] and family.qat_utils._fold_conv_bn_qat_helper is look
