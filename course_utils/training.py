"""Fine-tuning on real data: the one loop that quantization-aware training and its float32 control share.

    history = finetune(model, data.fashion_mnist("train"), steps=200, resume="tuning.pt")

Under `torchrun` the same call trains with several processes (DistributedDataParallel).
"""

import functools
import hashlib
import math
import time
import zipfile
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F

from . import cpu, data, files, qat

KEEP_EVERY = 10  # steps between two copies of weights that are known to be good


class Diverged(ArithmeticError):
    """The loss is no longer a number: raised at `step`, with the weights of step `kept` back in the model."""

    def __init__(self, loss, step, kept, lr):
        super().__init__(
            f"the loss is {loss} at step {step}: training stopped, and the model has its weights of step {kept} again, the last "
            f"that were kept. Try a smaller lr than {lr:g}; if it happens at step 0, look for images that are no numbers"
        )
        self.step, self.kept = step, kept


def _back_on_the_cpu(train):
    """Let the model of a training come back to the CPU however the training ends."""

    @functools.wraps(train)
    def trained(model, *args, **kwargs):
        try:
            return train(model, *args, **kwargs)
        finally:
            model.to("cpu")

    return trained


@_back_on_the_cpu
def finetune(
    model,
    images,
    *,
    steps,
    batch_size=32,
    lr=0.002,
    freeze_at=0.67,
    seed=0,
    shift=0,
    label_smoothing=0.0,
    bf16=False,
    device="cpu",
    resume=None,
    save_every=50,
    on_step=None,
):
    """Train `model` in place for `steps` optimizer steps and return a list of `(loss, seconds)`, one a step.

    model: any module, with or without fake-quantizers in it (`qat.prepare`, `backends.prepare_qat`), images → logits. images:
    a `data.Images` set; each batch is drawn from it by `seed`, mirrored half of the time, moved by up to `shift` pixels. lr:
    falls to zero along a half cosine. freeze_at: share of the steps after which quantization ranges and batch-norm statistics
    stand still, so that the last steps train the network that will be converted (Krishnamoorthi 2018, section 4; Jacob et al.
    2018, section 3.1). SGD with momentum 0.9 on the cross-entropy with the true labels. bf16: autocast to BF16, except on a
    processor without arithmetic for it. device: where to train; the model comes back to the CPU, whatever happens. on_step:
    called as `on_step(step, model)` after each step.

    resume: a file that keeps the state every `save_every` steps; if it is there, training goes on from it and ends as if
    nothing had happened. It is removed at the end. With it are kept the settings, a checksum of images and labels, and one of
    the names and shapes of the parameters: a file where any of them is another, or missing, is of another training.

    In a process group (`torchrun`), `batch_size` is that of all processes together, and each computes its share; batch norms
    that still train see their own share only.

    Raises `ValueError` for fewer than 1 step, a batch that the processes cannot share, and a `resume` file that is damaged
    or of another training, which leaves the model's weights alone; `Diverged` when the loss is not a number.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} images cannot be shared by {world} processes: take a multiple")
    bf16 = bf16 and (torch.device(device).type != "cpu" or cpu.has_bf16())
    model.to(device, memory_format=torch.channels_last).train()  # the layout that convolution kernels like best
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for dropout
    settings = {"steps": steps, "batch_size": batch_size, "lr": lr, "freeze_at": freeze_at, "seed": seed}
    settings |= {
        "shift": shift,
        "label_smoothing": label_smoothing,
        "bf16": bf16,
        "policy": str(getattr(model, "policy", None)),
    }
    if resume is not None:
        settings |= {"images": _images_checksum(images), "parameters": _parameters_checksum(model)}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = _load(resume, parts, generator, settings)
    network = model
    if world > 1:
        network = nn.parallel.DistributedDataParallel(model, device_ids=None if device == "cpu" else [device])
    kept, kept_at = None, None
    for step in range(len(history), steps):
        if step >= round(freeze_at * steps):
            qat.freeze(model)
        began = time.perf_counter()
        x, labels = (part[rank::world].to(device) for part in _draw(images, batch_size, shift, generator))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        mean = _mean(loss, world)
        if not math.isfinite(mean):
            if kept is not None:
                model.load_state_dict(kept)
            raise Diverged(mean, step, step if kept is None else kept_at, lr)
        if kept is None or step % KEEP_EVERY == 0:
            kept, kept_at = _copied(model.state_dict(), kept), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append((mean, time.perf_counter() - began))
        if on_step is not None:
            on_step(step, model)
        if resume is not None and rank == 0 and (step + 1) % save_every == 0:
            _save(resume, parts, generator, settings, history)
    optimizer.zero_grad()  # gradients take as much memory as the weights
    if resume is not None and rank == 0:
        Path(resume).unlink(missing_ok=True)
    return history


def _draw(images, count, shift, generator):
    """Return one batch of the whole training: float32 `(count, 3, size, size)` and its labels."""
    chosen = torch.randint(len(images), (count,), generator=generator)
    pixels = data.augment(images.pixels[chosen], shift, generator)
    return data.preprocess(pixels, images.size), images.labels[chosen]


def _copied(state, into):
    """Return a copy of `state`, in the memory of an earlier one if there is one."""
    if into is None:
        return {key: value.clone() for key, value in state.items()}
    for key, value in state.items():
        into[key].copy_(value)
    return into


def _mean(loss, world):
    mean = loss.detach().clone()
    if world > 1:
        distributed.all_reduce(mean)
    return mean.item() / world


def _images_checksum(images):
    digest = hashlib.sha256(f"{images.size} {tuple(images.pixels.shape)}".encode())
    for tensor in (images.pixels, images.labels):
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:12]


def _parameters_checksum(model):
    # Without buffers: those of torch's observers get another shape with the first batch.
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.sha256(str(shapes).encode()).hexdigest()[:12]


def _save(path, parts, generator, settings, history):
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"generator": generator.get_state(), "dropout": torch.get_rng_state()}
    with files.replacing(path) as partial:
        torch.save(state | {"settings": settings, "history": history}, partial)


def read_state(path):
    """Return what a training left in `path` with `torch.save`: a dict of tensors, numbers, text, lists and dicts.

    Raises `ValueError`, with what to do, for a file that is damaged or holds anything else; no code in it is run.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save writes
            whole = archive.testzip() is None
        state = torch.load(path, weights_only=True) if whole else None
    except MemoryError:
        raise
    except Exception:  # torch has another one for each kind of damage, and some advise to switch the protection off
        state = None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged, or not the state of a training: delete it to start anew")
    return state


def _load(path, parts, generator, settings):
    """Put the state in the file back, if there is one, and return the history up to there."""
    if path is None or not Path(path).exists():
        return []
    state = read_state(path)
    found = state.get("settings", {})
    if found != settings:
        differ = [f"{k} was {found.get(k)}, now {v}" for k, v in settings.items() if found.get(k) != v]
        raise ValueError(
            f"{path} holds another training ({', '.join(differ)}): give the same settings, or delete it to start anew"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["dropout"])
    return [tuple(entry) for entry in state["history"]]
