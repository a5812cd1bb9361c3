"""Fashion-MNIST from the repository's own files: four disjoint splits, held in memory as tensors.

Xiao et al., *Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms*, 2017 (arXiv 1708.07747).
"""

import contextlib
import functools
import gzip
import shutil
import zlib
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from . import files

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images scaled to 0..1; tests recompute them
PER_CLASS = {"calibration": 100, "validation": 400}  # taken from the official training set; the rest is `train`
SPLITS = ("train", "calibration", "validation", "test")
FOLDER = "FashionMNIST/raw"
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Images(torch.utils.data.Dataset):
    """A labelled set of grey images.

    `pixels`: uint8 `(n, 28, 28)`; `labels`: int64 `(n,)`; `size`: height and width in pixels that models get.
    `dataset[i]` is one pair ready for a model (float32 `(3, size, size)`, int); `batches` is the fast way to all of it.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    size: int = 64

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return preprocess(self.pixels[index][None], self.size)[0], int(self.labels[index])

    def subset(self, indices):
        """Return the images at `indices` (int64 tensor, boolean mask or slice) as a new set."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])


def fashion_mnist(split, *, size=64):
    """Return one split of Fashion-MNIST as `Images`, read through torchvision without a network.

    split: `"train"` (55,000 images), `"calibration"` (1,000), `"validation"` (4,000) or `"test"` (the official 10,000).
    The first three are disjoint parts of the official training set, class-balanced, in file order.
    size: height and width in pixels of the images that `batches` yields.

    Raises `ValueError` for an unknown split or size, `DataFileError` for a missing, truncated or altered file.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive number of pixels, got {size!r}")
    return Images(*_splits("test" if split == "test" else "train")[split], size)


class Batches:
    """The batches of `batches`: made anew at each pass, so that they can be gone through again and take no memory."""

    def __init__(self, dataset, batch_size, limit):
        self.dataset, self.batch_size = dataset, batch_size
        self.n = len(dataset) if limit is None else min(limit, len(dataset))

    def __len__(self):
        return -(-self.n // self.batch_size)

    def __iter__(self):
        for start in range(0, self.n, self.batch_size):
            part = slice(start, min(start + self.batch_size, self.n))
            yield preprocess(self.dataset.pixels[part], self.dataset.size), self.dataset.labels[part]


def batches(dataset, batch_size, *, limit=None):
    """Return an iterable of `(images, labels)`: float32 `(b, 3, size, size)` normalised and channels_last, int64 `(b,)`.

    They come in order, can be iterated as often as you like, and `len()` is their number. limit: stop after that many
    images (the last batch is cut to fit). Raises `ValueError` for a batch_size below 1 or a negative limit.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if limit is not None and limit < 0:
        raise ValueError(f"limit must not be negative, got {limit}")
    return Batches(dataset, batch_size, limit)


def preprocess(pixels, size):
    """Turn uint8 grey images `(n, 28, 28)` into model input: float32 `(n, 3, size, size)`, normalised, channels_last."""
    x = pixels[:, None].float().div_(255).sub_(MEAN).div_(STD)
    if x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def augment(pixels, shift, generator):
    """Return a copy of uint8 images `(n, 28, 28)`, each moved by up to ±shift pixels and mirrored half of the time."""
    n, side = len(pixels), pixels.shape[-1]
    padded = F.pad(pixels, (shift,) * 4)
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows = dy + torch.arange(side)
    columns = dx + torch.arange(side)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def require_torchvision():
    """Return the package torchvision. Raises `RuntimeError`, with what to do, where it is missing or made for another torch."""
    try:
        import torchvision
    except Exception as error:  # a wrong pair raises anything from ImportError to RuntimeError
        first_line = str(error).partition("\n")[0]
        raise RuntimeError(
            f"torchvision does not load with torch {torch.__version__} ({first_line}): run `make setup`, which installs the two "
            "that belong together; `make doctor` says more"
        ) from None
    return torchvision


def _split_indices(labels):
    # The official file is already shuffled, so "the first ones of each class" needs no random generator
    # and stays the same whatever the torch release.
    rank = torch.empty_like(labels)
    for c in labels.unique():
        of_class = labels == c
        rank[of_class] = torch.arange(int(of_class.sum()))
    first, second = PER_CLASS["calibration"], PER_CLASS["calibration"] + PER_CLASS["validation"]
    return {"calibration": rank < first, "validation": (rank >= first) & (rank < second), "train": rank >= second}


@functools.lru_cache(maxsize=2)
def _splits(part):
    """Return split → `(pixels, labels)` of one official part; the splits are kept in memory, the part itself is not."""
    pixels, labels = _official(part)
    if part == "test":
        return {"test": (pixels, labels)}
    return {split: (pixels[chosen], labels[chosen]) for split, chosen in _split_indices(labels).items()}


def _official(part):
    datasets = require_torchvision().datasets
    # torchvision wants all four files unpacked before it reads any.
    packed = [files.verified(f"{FOLDER}/{name}.gz") for name in IDX_FILES]
    root = files.data_dir()
    if not files.is_writable(root / FOLDER):  # a read-only checkout
        root = files.cache_dir()
    for path in packed:
        _unpack(path, root / FOLDER / path.stem)
    dataset = datasets.FashionMNIST(root=root, train=part == "train", download=False)
    return dataset.data, dataset.targets


def _unpack(packed, target):
    expected = files.read_manifest()[f"{FOLDER}/{packed.name}"]["unpacked_sha256"]
    if target.is_file() and files.sha256(target) == expected:
        return
    with files.replacing(target) as partial:
        with contextlib.suppress(gzip.BadGzipFile, EOFError, zlib.error), gzip.open(packed) as source:
            with open(partial, "wb") as unpacked:
                shutil.copyfileobj(source, unpacked)  # some at a time: what is packed may be a thousand times as large
        if files.sha256(partial) != expected:
            raise files.DataFileError(
                f"{packed} does not hold what {files.MANIFEST} says: restore both with `git checkout -- data`"
            )
