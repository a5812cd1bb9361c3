"""Train the character model of notebook 05 from the committed text: `make train-lm`, or `python -m course_utils.tools.train_lm`.

Every step draws its sequences from a generator seeded with (seed, step), so a run that was killed goes on exactly as if nothing
had happened.
"""

import math
import time
from dataclasses import asdict, dataclass, replace

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from course_utils import char_lm, cpu, files, measure, models, text, training

NAME = "char_lm"
SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; goes into the manifest as it stands."""

    steps: int = 1800
    batch_size: int = 16  # sequences of the model's whole context
    max_lr: float = 3e-3  # reached after `warmup` steps, from there along a half cosine to a tenth
    warmup: int = 100
    weight_decay: float = 0.1  # on matrices only
    clip: float = 1.0  # largest norm of all gradients together
    bf16: bool = True
    seed: int = 0


def train(recipe, *, progress=True):
    """Return `(model, seconds of training)`; resumes after a kill."""
    torch.manual_seed(recipe.seed)
    tokens, validation = text.king_james("train"), text.king_james("validation")
    model = models.build(NAME)
    optimizer = torch.optim.AdamW(_groups(model, recipe), lr=recipe.max_lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    resume_file = files.data_dir() / f"checkpoints/{NAME}.resume.pt"
    done, seconds = _load(resume_file, parts, recipe)
    bar = tqdm(total=recipe.steps, initial=done, desc=NAME, unit="step", mininterval=2, disable=not progress)
    for step in range(done, recipe.steps):
        began = time.perf_counter()
        x, y = _draw(tokens, recipe, model.context, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            logits = model(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - began
        bar.update()
        if (step + 1) % SAVE_EVERY == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            with files.replacing(resume_file) as partial:
                torch.save(state | {"done": step + 1, "seconds": seconds, "recipe": asdict(recipe)}, partial)
        if (step + 1) % (4 * SAVE_EVERY) == 0:
            held_out = char_lm.loss(model, validation, sequences=64, length=model.context)
            bar.write(f"step {step + 1}: loss {loss:.3f}, validation {held_out} nats a character, {seconds:.0f} s")
    bar.close()
    return model.eval(), seconds


def _groups(model, recipe):
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _rate(step, recipe):
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _draw(tokens, recipe, length, step):
    """Return `(inputs, targets)` of one step: int64 `(batch_size, length)`, from anywhere in the text."""
    generator = torch.Generator().manual_seed(1_000_000 * recipe.seed + step)
    starts = torch.randint(len(tokens) - length, (recipe.batch_size, 1), generator=generator)
    drawn = tokens[starts + torch.arange(length + 1)].long()
    return drawn[:, :-1], drawn[:, 1:]


def _load(path, parts, recipe):
    """Fill `parts` from the resume file, if there is one of this recipe; return the steps and the seconds done."""
    if not path.exists():
        return 0, 0.0
    state = training.read_state(path)
    if state.get("recipe") != asdict(recipe):
        return 0, 0.0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    print(f"{NAME}: resuming after step {state['done']}", flush=True)
    return state["done"], state["seconds"]


def publish(model, recipe, seconds, *, tokens=None):
    """Store the weights as FP16 (safetensors) with a manifest entry, remove the resume file, return the `Loss` on the test text.

    tokens: another text than that to measure on.
    """
    tokens = text.king_james("test") if tokens is None else tokens
    before = char_lm.loss(model, tokens, length=model.context)
    stored = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    model.load_state_dict(stored)  # copies into the float32 parameters
    after = char_lm.loss(model, tokens, length=model.context)
    target = models.checkpoint(NAME)
    with files.replacing(files.data_dir() / target) as partial:
        save_file(stored, partial)
    files.update_manifest(
        target,
        licence="MIT",
        origin=f"trained by `make train-lm` from {text.FILE} in this folder",
        recipe=asdict(recipe),
        storage="FP16",
        seconds=round(seconds),
        machine=measure.machine(),
        loss={
            "test": after.value,
            "low": after.low,
            "high": after.high,
            "sequences": len(after.each),
            "unit": "nats per character",
            "confidence": 0.95,
        },
        loss_fp32_weights=before.value,
    )
    (files.data_dir() / f"checkpoints/{NAME}.resume.pt").unlink(missing_ok=True)
    return after


def main():
    recipe = replace(Recipe(), bf16=cpu.has_bf16())
    model, seconds = train(recipe)
    score = publish(model, recipe, seconds)
    print(f"{NAME}: {score} nats a character on the test text, {seconds / 60:.1f} min → data/{models.checkpoint(NAME)}")


if __name__ == "__main__":
    main()
