"""Train the course's models from the committed data: `make train`, or `python -m course_utils.tools.train [name ...]`.

Each epoch draws its random numbers from a generator seeded with (seed, epoch), so a run that was killed goes on from its
last whole epoch exactly as if nothing had happened.
"""

import argparse
import time
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from course_utils import data, files, measure, models


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; goes into the manifest as it stands."""

    sizes: tuple[int, ...]  # image size of each epoch in pixels: small first, because early epochs need no detail
    bf16: bool  # autocast pays where dense convolutions dominate and costs for depthwise ones
    weight_decay: float  # on convolution and linear weights only
    max_lr: float = 0.1
    batch_size: int = 128
    momentum: float = 0.9
    label_smoothing: float = 0.1
    shift: int = 2  # pixels of the 28 × 28 original, each way
    seed: int = 0

    @property
    def epochs(self):
        return len(self.sizes)

    @property
    def size(self):
        """The size the trained model is used at."""
        return self.sizes[-1]


RECIPES = {
    "resnet18": Recipe(sizes=(48,) * 8 + (64,) * 4, bf16=True, weight_decay=5e-4),
    "mobilenet_v2": Recipe(sizes=(32,) * 6 + (48,) * 4 + (64,) * 4, bf16=False, weight_decay=1e-4),
}


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


def train(name, recipe, *, progress=True):
    """Train `name` and return `(model, seconds)`; resumes after a kill from the last whole epoch."""
    torch.manual_seed(recipe.seed)
    train_set = data.fashion_mnist("train")
    validation = data.fashion_mnist("validation", size=recipe.size)
    model = models.build(name).to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.max_lr,
        momentum=recipe.momentum,
        nesterov=True,
        fused=True,
    )
    steps = len(train_set) // recipe.batch_size  # the last, smaller batch is dropped
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.max_lr, total_steps=recipe.epochs * steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}

    resume_file = files.data_dir() / f"checkpoints/{name}.resume.pt"
    first, seconds = 0, 0.0
    if resume_file.exists():
        state = torch.load(resume_file, weights_only=True)
        if state["recipe"] == asdict(recipe):
            for key, part in parts.items():
                part.load_state_dict(state[key])
            first, seconds = state["epochs_done"], state["seconds"]
            print(f"{name}: resuming after epoch {first}", flush=True)

    bar = tqdm(
        total=recipe.epochs * steps, initial=first * steps, desc=name, unit="step", mininterval=2, disable=not progress
    )
    for epoch in range(first, recipe.epochs):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(1000 * recipe.seed + epoch)
        order = torch.randperm(len(train_set), generator=generator)
        model.train()
        for step in range(steps):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            x = data.preprocess(augment(train_set.pixels[chosen], recipe.shift, generator), recipe.sizes[epoch])
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), train_set.labels[chosen], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        seconds += time.perf_counter() - started
        with files.replacing(resume_file) as partial:
            state = {key: part.state_dict() for key, part in parts.items()}
            torch.save(state | {"epochs_done": epoch + 1, "seconds": seconds, "recipe": asdict(recipe)}, partial)
        score = measure.accuracy(model, data.batches(validation, 250))
        bar.write(f"{name}: epoch {epoch + 1}/{recipe.epochs}  loss {loss.item():.3f}  validation {score}  {seconds:.0f} s")
    bar.close()
    return model.eval(), seconds


def publish(name, model, recipe, seconds):
    """Store the trained weights as FP16 safetensors with a manifest entry, then remove the resume file.

    Raises `RuntimeError` when FP16 storage would cost a test image net; nothing is written then.
    """
    test = data.fashion_mnist("test", size=recipe.size)
    before = measure.accuracy(model, data.batches(test, 250))
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    after = measure.accuracy(model, data.batches(test, 250))
    if after.successes < before.successes:
        raise RuntimeError(f"FP16 storage costs {before.successes - after.successes} test images: store FP32 instead")
    target = models.checkpoint(name)
    with files.replacing(files.data_dir() / target) as partial:
        save_file({k: v.contiguous() for k, v in half.items()}, partial)
    files.update_manifest(
        target,
        licence="MIT, as the data and the architecture's code (torchvision, BSD-3-Clause)",
        origin="trained by `make train` from FashionMNIST in this folder",
        recipe=asdict(recipe),
        seconds=round(seconds),
        machine=measure.machine(),
        accuracy={"test": after.value, "low": after.low, "high": after.high, "n": after.n, "confidence": 0.95},
        accuracy_fp32_weights=before.value,
    )
    (files.data_dir() / f"checkpoints/{name}.resume.pt").unlink(missing_ok=True)
    return after


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"models to train (default: {' '.join(RECIPES)})")
    names = parser.parse_args().names or list(RECIPES)
    for name in names:
        if name not in RECIPES:
            parser.error(f"unknown model {name!r}: choose from {', '.join(RECIPES)}")
    for name in names:
        model, seconds = train(name, RECIPES[name])
        score = publish(name, model, RECIPES[name], seconds)
        print(f"{name}: {score} on the test set, {seconds / 60:.1f} min of training → data/{models.checkpoint(name)}")


if __name__ == "__main__":
    main()
