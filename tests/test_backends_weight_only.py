"""Linear layers that compute with packed weights: what comes out is what the integers say, and the memory is what they take."""

import importlib.util

import pytest
import torch
from torch import nn

from course_utils import affine, backends, char_lm, int4, rounding, simulate
from course_utils.backends import weight_only
from course_utils.simulate import Policy


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    model = char_lm.CharLM(context=32, width=64, heads=2, blocks=2)
    model.architecture = {"name": "char_lm"}
    return model.eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 63, (4, 32), generator=torch.Generator().manual_seed(0))


def rows(n, length, seed=0):
    return torch.randn(n, length, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("out", [64, 63, 5])
def test_int4_weights_compute_what_they_stand_for(group_size, symmetric, out):
    w = 0.05 * rows(out, 512, seed=out)
    layer = nn.Linear(512, out).eval()
    policy = Policy(weights=4, granularity=group_size, symmetric=symmetric)
    layer.weight_qparams = simulate.weight_qparams(w, policy, 4)
    layer.weight = nn.Parameter(affine.fake_quantize(w, layer.weight_qparams), requires_grad=False)
    x = rows(3, 512)
    small = weight_only.int4_linear(layer, group_size=999)  # the layer's own groups count
    with torch.no_grad():
        assert relative(small(x), layer(x)) < 0.01  # BF16: 8 bits of inputs and scales
        assert small(x.reshape(3, 1, 512)).shape == (3, 1, out)
    # one input at a time shows the weights themselves
    seen = small(torch.eye(512))[:, : small.out] - layer.bias
    assert (seen.T - layer.weight).abs().max() <= 0.006 * layer.weight.abs().max()


def test_int8_weights_compute_what_they_stand_for():
    layer = nn.Linear(512, 40).eval()
    x = rows(2, 512)
    with torch.no_grad():
        assert relative(weight_only.int8_linear(layer)(x), layer(x)) < 0.015


@pytest.mark.parametrize(("bits", "share"), [(8, 0.26), (4, 0.16)])
def test_a_language_model_keeps_its_outputs_and_loses_its_bytes(lm, tokens, bits, share):
    fast = backends.quantize_weight_only(lm, bits=bits, group_size=64)
    reference = simulate.quantize(lm, Policy(weights=bits, granularity="channel" if bits == 8 else 64))
    with torch.no_grad():
        assert relative(fast(tokens), reference(tokens)) < 0.02
    before = sum(layer.weight.nbytes for layer in lm.modules() if isinstance(layer, nn.Linear))
    kinds = (weight_only.Int8Linear, weight_only.Int4Linear)
    after = sum(b.nbytes for layer in fast.modules() if isinstance(layer, kinds) for b in layer.buffers())
    assert after < share * before and not any(isinstance(layer, nn.Linear) for layer in fast.modules())
    assert any(isinstance(layer, nn.Linear) for layer in lm.modules()), "the model itself was changed"


def test_single_layers_can_have_other_bits(lm):
    fast = backends.quantize_weight_only(lm, bits=4, group_size=64, layers={"head": 8})
    assert isinstance(fast.head, weight_only.Int8Linear) and isinstance(fast.blocks[0].up, weight_only.Int4Linear)


def test_a_layer_can_stay_as_it_is(lm):
    fast = backends.quantize_weight_only(lm, bits=4, group_size=64, layers={"head": None})
    assert type(fast.head) is nn.Linear and torch.equal(fast.head.weight, lm.head.weight)
    assert fast.head.weight is not lm.head.weight, "the copy shares a parameter with the model"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("bits", [8, 4])
def test_attention_that_takes_weights_of_its_layers_without_calling_them_goes_on_working(bits):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 2).eval()
    out_proj = [f"layers.{i}.self_attn.out_proj" for i in range(2)]
    fast = backends.quantize_weight_only(model, bits=bits, group_size=64)
    granularity = "channel" if bits == 8 else 64
    reference = simulate.quantize(model, Policy(bits, granularity=granularity, layers=dict.fromkeys(out_proj)))
    x, padding = rows(10, 64).reshape(2, 5, 64), torch.arange(5) >= torch.tensor([[5], [3]])
    with torch.no_grad():
        assert relative(fast(x), reference(x)) < 0.02 < relative(fast(x), x)
        found, expected = (m(x, src_key_padding_mask=padding)[~padding] for m in (fast, reference))
        assert relative(found, expected) < 0.02
    kinds = weight_only.Int8Linear, weight_only.Int4Linear
    assert sum(isinstance(layer, kinds) for layer in fast.modules()) == 4
    assert isinstance(fast.get_submodule(out_proj[0]), nn.Linear)
    with pytest.raises(
        ValueError, match="layers.0.self_attn.out_proj cannot be packed.*MultiheadAttention.*leave it out"
    ):
        backends.quantize_weight_only(model, layers={out_proj[0]: 8})


@pytest.mark.parametrize("repair", [rounding.gptq, rounding.awq])
def test_integers_of_a_repair_are_the_ones_that_run_and_are_stored(lm, tokens, tmp_path, repair, monkeypatch):
    repaired, _ = repair(lm, Policy(weights=4, granularity=32), [tokens])
    fast = backends.quantize_weight_only(repaired, group_size=128)
    with torch.no_grad():
        assert relative(fast(tokens), repaired(tokens)) < 0.02
    monkeypatch.setattr(int4.models, "build", lambda name: char_lm.CharLM(context=32, width=64, heads=2, blocks=2))
    int4.save_packed(repaired, tmp_path / "lm")
    loaded = int4.load_packed(tmp_path / "lm")
    with torch.no_grad():
        assert relative(loaded(tokens), repaired(tokens)) < 1e-3  # embeddings and norms became FP16


def test_what_there_is_no_kernel_for_is_said(lm):
    with pytest.raises(ValueError, match="4 and 8 bits, got 3"):
        backends.quantize_weight_only(lm, bits=3)
    with pytest.raises(ValueError, match="groups of 128 do not fill rows of 64 weights"):
        backends.quantize_weight_only(lm, group_size=128)
    with pytest.raises(ValueError, match="no linear layer is called tail; there are: blocks.0.qkv, "):
        backends.quantize_weight_only(lm, layers={"tail": 8})
    with pytest.raises(ValueError, match="groups of 32, 64, 128, 256 weights that fill a row of 64, got 16"):
        weight_only.Int4Linear(torch.zeros(16, 64), torch.ones(16, 4), torch.zeros(16, 4), 16)


def test_all_ways_multiply_by_the_same_weights():
    w, x = 0.02 * rows(96, 512), rows(5, 512, seed=1)
    for group_size, few in ((64, 4.5), (128, 4.25)):
        q, qparams = int4.quantize_groupwise(w, group_size=group_size)
        stand_for = {"INT4": affine.dequantize(q, qparams)}
        ways = backends.linear_ways(group_size=group_size)
        for name, (bits, make) in ways.items():
            with torch.no_grad():
                y = make(w)(x)
            assert y.dtype == torch.float32 and y.shape == (5, 96)
            # the inputs of ONNX Runtime's way are rounded to 8 bits
            assert relative(y, x @ stand_for.get(name[:4], w).T) < 0.015, name
            assert bits == {"FP32": 32, "BF16": 16, "INT8": 8, "INT4": few}[name[:4]]
            if isinstance(layer := make(w), weight_only.Int4Linear):
                assert bits == 8 * sum(stored.nbytes for stored in layer.buffers()) / w.numel()
    assert ("INT4 weights, ONNX Runtime" in ways) == (
        importlib.util.find_spec("onnxruntime") is not None and importlib.util.find_spec("onnx") is not None
    )
