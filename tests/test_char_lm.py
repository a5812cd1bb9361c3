import math

import pytest
import torch
from torch.nn import functional as F

from course_utils import char_lm, files, models, text


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = char_lm.CharLM(context=32, width=16, heads=2, blocks=2)
    for parameter in model.parameters():  # larger than at the start of a training, so that everything matters
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_no_character_sees_a_later_one(small):
    tokens = torch.randint(0, 63, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 63
    with torch.no_grad():
        before, after = small(tokens), small(changed)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20:], after[:, 20:])
    assert not torch.allclose(before[:, 31], after[:, 31])


def test_a_character_at_a_time_gives_the_same_as_all_at_once(small):
    tokens = torch.randint(0, 63, (3, 32), generator=torch.Generator().manual_seed(1))
    cache = []
    with torch.no_grad():
        expected = small(tokens)
        found = [small(tokens[:, :7], cache), *(small(tokens[:, i : i + 1], cache) for i in range(7, 32))]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


def test_more_than_the_context_is_refused(small):
    with pytest.raises(ValueError, match="up to 32 characters.*got 33"):
        small(torch.zeros(1, 33, dtype=torch.int64))
    cache = []
    with torch.no_grad():
        small(torch.zeros(1, 32, dtype=torch.int64), cache)
        with pytest.raises(ValueError, match="got 33"):
            small(torch.zeros(1, 1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="or one after those in the cache"):
        small(torch.zeros(1, 2, dtype=torch.int64), [(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))] * 2)


def test_loss_is_the_mean_over_sequences_with_an_interval(small):
    tokens = torch.randint(0, 63, (321,), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    found = char_lm.loss(small, tokens, length=32, batch_size=3)
    x, y = tokens[:320].long().view(10, 32), tokens[1:321].long().view(10, 32)
    with torch.no_grad():
        expected = F.cross_entropy(small(x).flatten(0, 1), y.flatten())
    assert found.value == pytest.approx(float(expected), rel=1e-5) and len(found.each) == 10
    margin = 1.96 * float(found.each.std()) / math.sqrt(10)
    assert (found.low, found.high) == (pytest.approx(found.value - margin), pytest.approx(found.value + margin))
    assert found.bits == pytest.approx(found.value / math.log(2))
    assert char_lm.Loss(torch.full((3,), math.log(2))).bits == pytest.approx(1)
    assert len(char_lm.loss(small, tokens, length=32, sequences=4).each) == 4


def test_two_losses_are_compared_sequence_by_sequence():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.1, 2.1, 3.1])
    difference = char_lm.Loss(b) - char_lm.Loss(a)
    assert difference.value == pytest.approx(0.1) and difference.low == pytest.approx(0.1, abs=1e-6)
    assert "0.1000 [0.1000, 0.1000]" in str(difference)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_writing_goes_on_beyond_the_context(small, temperature):
    prompt = text.encode("In the")
    written = char_lm.generate(small, prompt, 60, temperature=temperature, seed=3)
    assert written.dtype == torch.uint8 and len(written) == 66 and torch.equal(written[:6], prompt)
    assert torch.equal(written, char_lm.generate(small, prompt, 60, temperature=temperature, seed=3))
    if temperature == 0:  # within the context it is what the network finds likeliest, all read at once
        for end in range(6, 30):
            with torch.no_grad():
                assert int(small(written[None, :end].long())[0, -1].argmax()) == int(written[end])
    else:
        assert not torch.equal(written, char_lm.generate(small, prompt, 60, temperature=temperature, seed=4))


@pytest.mark.parametrize(
    ("length", "expected"), [(20, [20, 1, 1]), (31, [31, 1, 16]), (32, [32, 16, 1]), (40, [32, 16, 1])]
)
def test_all_that_fits_of_a_prompt_is_read(small, length, expected):
    read = []
    handle = small.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    char_lm.generate(small, torch.arange(length).to(torch.uint8), 3)
    handle.remove()
    assert read == expected


def test_writing_needs_something_to_start_from(small):
    with pytest.raises(ValueError, match="got 0 tokens"):
        char_lm.generate(small, text.encode(""), 3)
    with pytest.raises(ValueError, match="-1"):
        char_lm.generate(small, text.encode("a"), 3, temperature=-1)


def test_the_committed_network_reads_and_writes_as_its_manifest_entry_says():
    entry = files.read_manifest()[models.checkpoint("char_lm")]
    model = models.load("char_lm")
    found = char_lm.loss(model, text.king_james("test"))
    assert entry["loss"]["test"] <= 1.45 and abs(found.value - entry["loss"]["test"]) < 1e-3
    some = char_lm.loss(model, text.king_james("test"), sequences=60)
    assert some.low < found.value < some.high
    words = text.decode(char_lm.generate(model, text.encode("And the LORD said unto "), 300)).split()
    known = set(text.decode(text.king_james("train")).split())
    assert sum(word in known for word in words) > 0.85 * len(words)
    with pytest.raises(ValueError, match="no weights for images"):
        models.load("char_lm", weights="imagenet")
