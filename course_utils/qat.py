"""Fine-tuning on real data: the one loop that quantization-aware training and its float control arm share."""

import time

import torch
from torch import nn
from torch.nn import functional as F

from . import data


def finetune(model, images, *, steps, batch_size=32, lr=0.002, freeze_at=0.67, seed=0, on_step=None):
    """Train `model` in place for `steps` optimizer steps and return a list of `(loss, seconds)`, one a step.

    model: any module, with or without fake-quantizers in it (`backends.prepare_qat`), images → logits. images: a
    `data.Images` set; each batch is drawn from it by `seed` and mirrored half of the time. lr: falls to zero along a half
    cosine. freeze_at: share of the steps after which quantization ranges and batch-norm statistics stand still, so that the
    last steps train the network that will be converted (Krishnamoorthi 2018, section 4; Jacob et al. 2018, section 3.1).
    on_step: called as `on_step(step, model)` after each step.

    SGD with momentum 0.9, cross-entropy with the true labels. Raises `ValueError` for fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    model.to(memory_format=torch.channels_last).train()  # the layout that convolution kernels like best
    for step in range(steps):
        if step == round(freeze_at * steps):
            freeze(model)
        began = time.perf_counter()
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        x = data.preprocess(images.pixels[chosen], images.size)
        mirrored = torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5
        loss = F.cross_entropy(model(torch.where(mirrored, x.flip(3), x)), images.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append((loss.item(), time.perf_counter() - began))
        if on_step is not None:
            on_step(step, model)
    optimizer.zero_grad()  # gradients take as much memory as the weights
    return history


def freeze(model):
    """Stop quantization ranges and batch-norm statistics from moving; weights go on learning."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        elif hasattr(module, "disable_observer"):  # a fake-quantizer
            module.disable_observer()
