"""A small language model, the course's network made of linear layers: a transformer that reads and writes characters.

    model = models.load("char_lm")
    print(loss(model, text.king_james("test"), sequences=100))       # nats per character, with an interval
    print(text.decode(generate(model, text.encode("And God said"), 200)))

The decoder of Radford et al. 2019 (GPT-2) in its plainest form: normalisation before each part, no dropout, no biases.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import text

SYMBOLS = len(text.SYMBOLS)


class Block(nn.Module):
    """Attention over the characters so far, then two linear layers for each character; both add to what comes in."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, past=None):
        """Return what becomes of `x`, and the keys and values of all characters so far, which are `past` the next time."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)))), (k, v)


class CharLM(nn.Module):
    """Tokens int64 `(n, length)` → logits float32 `(n, length, symbols)` of the next character; length ≤ `context`.

    A `cache`, a list that starts empty, remembers the characters so far: the next call then takes a single one more.
    """

    def __init__(self, *, symbols=SYMBOLS, context=256, width=256, heads=4, blocks=4):
        super().__init__()
        self.context = context
        self.token = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:  # so that the sum over all blocks starts no larger than one of them
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * blocks))

    def forward(self, tokens, cache=None):
        before = cache[0][0].shape[2] if cache else 0
        end = before + tokens.shape[1]
        if end > self.context or (before and tokens.shape[1] > 1):
            raise ValueError(f"expected up to {self.context} characters, or one after those in the cache, got {end}")
        x, kept = self.token(tokens) + self.position.weight[before:end], []
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x, found = block(x, past)
            kept.append(found)
        if cache is not None:
            cache[:] = kept
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Loss:
    """The cross-entropy of held-out text in nats per character, the mean over sequences: float64 `each`, `(sequences,)`.

    `low` and `high` are the ends of its 95 % interval, from the normal approximation over sequences.
    """

    each: torch.Tensor

    @property
    def value(self):
        return self.each.mean().item()

    @property
    def bits(self):
        """The same in bits per character."""
        return self.value / math.log(2)

    @property
    def _margin(self):
        return 1.96 * self.each.std().item() / math.sqrt(len(self.each))

    @property
    def low(self):
        return self.value - self._margin

    @property
    def high(self):
        return self.value + self._margin

    def __sub__(self, other):
        """Return the difference sequence by sequence, again with an interval; both must be of the same text."""
        return Loss(self.each - other.each)

    def __str__(self):
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@torch.no_grad()
def loss(model, tokens, *, sequences=None, length=256, batch_size=16):
    """Return the `Loss` of `model` on `tokens` (`text.king_james`), cut into sequences of `length` characters.

    sequences: so many at most. Raises `ValueError` for a text shorter than one.
    """
    inputs, targets = text.sequences(tokens, length, limit=sequences)
    each = [
        F.cross_entropy(model(x).float().transpose(1, 2), y, reduction="none").double().mean(1)
        for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    ]
    return Loss(torch.cat(each))


@torch.no_grad()
def generate(model, prompt, count, *, temperature=0.8, seed=0):
    """Return `prompt` (tokens `(length,)`) and `count` characters that `model` writes after it: uint8.

    Each is drawn from what the model predicts, sharpened by `temperature` below 1; 0 takes the likeliest. Of a prompt longer
    than the model's context only its end is read. Raises `ValueError` for an empty prompt or a negative temperature.
    """
    if not len(prompt) or temperature < 0:
        raise ValueError(
            f"expected a prompt and a temperature of at least 0, got {len(prompt)} tokens and {temperature}"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens, cache = prompt.long(), []
    for _ in range(count):
        if not cache:
            new = tokens[-model.context :]
        elif cache[0][0].shape[2] == model.context:  # full: read the newer half again, and go on from there
            cache = []
            new = tokens[-model.context // 2 :]
        else:
            new = tokens[-1:]
        logits = model(new[None], cache)[0, -1]
        if temperature == 0:
            following = logits.argmax(keepdim=True)
        else:
            following = torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)
        tokens = torch.cat([tokens, following])
    return tokens.to(torch.uint8)
