"""Train the course's models from the committed data: `make train`, or `python -m course_utils.tools.train [name ...]`.

Each epoch draws its random numbers from a generator seeded with (seed, epoch), so a run that was killed goes on from its
last whole epoch exactly as if nothing had happened.
"""

import time
from dataclasses import asdict, dataclass, replace

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from course_utils import cpu, data, files, measure, models, training
from course_utils.tools import names_from_command_line


@dataclass(frozen=True)
class Cycle:
    """One rise and fall of the learning rate (OneCycleLR), with the image size in pixels of each of its epochs."""

    sizes: tuple[int, ...]
    max_lr: float
    shift: int = 2  # images move by up to so many pixels of the 28 × 28 original, each way


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; goes into the manifest as it stands."""

    cycles: tuple[Cycle, ...]
    bf16: bool  # autocast pays where dense convolutions dominate and costs for depthwise ones
    weight_decay: float  # on convolution and linear weights only
    batch_size: int = 128
    momentum: float = 0.9
    label_smoothing: float = 0.1
    seed: int = 0

    @property
    def epochs(self):
        return sum(len(cycle.sizes) for cycle in self.cycles)

    @property
    def size(self):
        """The size the trained model is used at."""
        return self.cycles[-1].sizes[-1]


# The last epoch sees images where the test set has them, unshifted. MobileNetV2 gets small images first: early epochs need no
# detail, and cost less than half. ResNet18 gains little from that, for its last layers are slow on odd maps of 1 or 3 pixels.
RECIPES = {
    "resnet18": Recipe(
        (Cycle((64,) * 8, max_lr=0.1, shift=1), Cycle((64,), max_lr=0.01, shift=0)),
        bf16=True,
        weight_decay=5e-4,
    ),
    "mobilenet_v2": Recipe(
        (Cycle((32,) * 6 + (48,) * 4 + (64,) * 4, max_lr=0.1), Cycle((64,), max_lr=0.01, shift=0)),
        bf16=False,
        weight_decay=1e-4,
    ),
}


STORAGE = {  # name → which tensors become FP16
    "FP16": lambda tensor: True,
    "FP16, batch norm FP32": lambda tensor: tensor.ndim > 1,
    "FP32": lambda tensor: False,
}


def train(name, recipe, *, progress=True):
    """Train `name` and return `(model, seconds)`; resumes after a kill from the last whole epoch."""
    torch.manual_seed(recipe.seed)
    train_set = data.fashion_mnist("train")
    validation = data.batches(data.fashion_mnist("validation", size=recipe.size), 250)
    model = models.build(name).to(memory_format=torch.channels_last)
    steps = len(train_set) // recipe.batch_size  # the last, smaller batch is dropped

    resume_file = files.data_dir() / f"checkpoints/{name}.resume.pt"
    done, seconds, state = 0, 0.0, None
    if resume_file.exists():
        state = training.read_state(resume_file)
        if state.get("recipe") == asdict(recipe):
            model.load_state_dict(state["model"])
            done, seconds = state["epochs_done"], state["seconds"]
            print(f"{name}: resuming after epoch {done}", flush=True)

    bar = tqdm(
        total=recipe.epochs * steps, initial=done * steps, desc=name, unit="step", mininterval=2, disable=not progress
    )
    epoch = 0
    for cycle in recipe.cycles:
        optimizer, schedule = _optimizer(model, recipe, cycle, steps)
        if epoch < done < epoch + len(cycle.sizes):  # killed within this cycle
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        for size in cycle.sizes:
            epoch += 1
            if epoch <= done:
                continue
            started = time.perf_counter()
            torch.manual_seed(1000 * recipe.seed + epoch)  # for dropout, so that a resumed run draws what it would have
            for x, y in _augmented(train_set, recipe, cycle.shift, size, epoch, steps):
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            seconds += time.perf_counter() - started
            with files.replacing(resume_file) as partial:
                parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
                state = {key: part.state_dict() for key, part in parts.items()}
                torch.save(state | {"epochs_done": epoch, "seconds": seconds, "recipe": asdict(recipe)}, partial)
            score = measure.accuracy(model, validation)
            bar.write(f"{name}: epoch {epoch}/{recipe.epochs}  loss {loss:.3f}  validation {score}  {seconds:.0f} s")
    bar.close()
    return model.eval(), seconds


def _optimizer(model, recipe, cycle, steps):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=cycle.max_lr, momentum=recipe.momentum, nesterov=True, fused=True)
    total = len(cycle.sizes) * steps
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, cycle.max_lr, total_steps=total)


def _augmented(images, recipe, shift, size, epoch, steps):
    """Yield the batches of one epoch: float32 `(b, 3, size, size)` and labels `(b,)`, the same for the same epoch."""
    generator = torch.Generator().manual_seed(1000 * recipe.seed + epoch - 1)
    order = torch.randperm(len(images), generator=generator)
    for step in range(steps):
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        yield data.preprocess(data.augment(images.pixels[chosen], shift, generator), size), images.labels[chosen]


def publish(name, model, recipe, seconds):
    """Store the trained weights as safetensors with a manifest entry, remove the resume file, return the test accuracy.

    They are stored as FP16, batch norms excepted if need be, or as FP32 if either would cost a test image net.
    """
    test = data.batches(data.fashion_mnist("test", size=recipe.size), 250)
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    before = measure.accuracy(model, test)
    for storage in STORAGE:
        halved = STORAGE[storage]
        stored = {k: v.half() if v.is_floating_point() and halved(v) else v for k, v in trained.items()}
        model.load_state_dict(stored)  # copies into the float32 parameters
        after = measure.accuracy(model, test)
        if after.successes >= before.successes:
            break
    target = models.checkpoint(name)
    with files.replacing(files.data_dir() / target) as partial:
        save_file({k: v.contiguous() for k, v in stored.items()}, partial)
    files.update_manifest(
        target,
        licence="MIT, as the data and the architecture's code (torchvision, BSD-3-Clause)",
        origin="trained by `make train` from the FashionMNIST files in this folder",
        recipe=asdict(recipe),
        storage=storage,
        seconds=round(seconds),
        machine=measure.machine(),
        accuracy={"test": after.value, "low": after.low, "high": after.high, "n": after.n, "confidence": 0.95},
        accuracy_fp32_weights=before.value,
    )
    (files.data_dir() / f"checkpoints/{name}.resume.pt").unlink(missing_ok=True)
    return after


def main():
    names = names_from_command_line(__doc__, RECIPES, "models to train")
    for name in names:
        recipe = replace(RECIPES[name], bf16=RECIPES[name].bf16 and cpu.has_bf16())
        model, seconds = train(name, recipe)
        score = publish(name, model, recipe, seconds)
        print(f"{name}: {score} on the test set, {seconds / 60:.1f} min of training → data/{models.checkpoint(name)}")


if __name__ == "__main__":
    main()
