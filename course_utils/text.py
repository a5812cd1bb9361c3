"""The King James Bible, character by character: four disjoint splits of whole chapters, for the language model of notebook 05.

tokens = king_james("test")                 # uint8, one token a character
print(decode(tokens[:200]))
"""

import functools
import gzip

import torch

from . import data, files

FILE = "text/king_james_bible.txt.gz"
SYMBOLS = "\n !'(),-.:;?ABCDEFGHIJKLMNOPQRSTUVWYZabcdefghijklmnopqrstuvwxyz"
CHAPTER_OF = {"validation": 0, "calibration": 5, "test": 10}  # of every 20 chapters; the rest is `train`


def king_james(split):
    """Return the tokens of one split: uint8 `(characters,)`, numbers of `SYMBOLS`, a verse a line.

    split: `"train"`, `"calibration"`, `"validation"` or `"test"`: 17, 1, 1 and 1 of every 20 chapters, so that each has all
    books in it. Raises `ValueError` for an unknown split, `DataFileError` for a missing or altered file.
    """
    if split not in data.SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(data.SPLITS)}")
    return _splits()[split]


def encode(characters):
    """Return the tokens of a string: uint8 `(characters,)`. Raises `ValueError` for characters that are not in `SYMBOLS`."""
    unknown = sorted(set(characters) - set(SYMBOLS))
    if unknown:
        raise ValueError(f"the text knows no {', '.join(map(repr, unknown))}: its characters are {SYMBOLS!r}")
    return torch.tensor([SYMBOLS.index(c) for c in characters], dtype=torch.uint8)


def decode(tokens):
    """Return the string that tokens `(characters,)` stand for."""
    return "".join(SYMBOLS[token] for token in tokens.tolist())


def sequences(tokens, length, *, limit=None):
    """Return `(inputs, targets)` for a language model: int64 `(sequences, length)` each, targets one character further on.

    The sequences follow one another and do not overlap; what is left at the end is left out. limit: take so many at most,
    from all over the text. Raises `ValueError` for a text that is too short for one.
    """
    count = (len(tokens) - 1) // length
    if count < 1:
        raise ValueError(f"{len(tokens)} characters are too few for a sequence of {length} and the character after it")
    n = count if limit is None else min(count, limit)
    chosen = torch.arange(n) * count // n  # evenly spread: one book is easier to foresee than another
    inputs, targets = (tokens[start : start + count * length].view(count, length)[chosen].long() for start in (0, 1))
    return inputs, targets


@functools.lru_cache(maxsize=1)
def _splits():
    chapters = gzip.decompress(files.verified(FILE).read_bytes()).decode("ascii").split("\n\n")
    splits = dict.fromkeys(data.SPLITS, "")
    for split in splits:
        wanted = CHAPTER_OF.get(split)
        chosen = [
            chapter
            for number, chapter in enumerate(chapters)
            if (number % 20 == wanted if wanted is not None else number % 20 not in CHAPTER_OF.values())
        ]
        splits[split] = _tokens("\n\n".join(chosen))
    return splits


def _tokens(characters):
    """Like `encode`, for millions of characters."""
    table = torch.full((128,), 255, dtype=torch.uint8)
    table[torch.tensor([ord(c) for c in SYMBOLS])] = torch.arange(len(SYMBOLS), dtype=torch.uint8)
    return table[torch.frombuffer(bytearray(characters, "ascii"), dtype=torch.uint8).long()]
