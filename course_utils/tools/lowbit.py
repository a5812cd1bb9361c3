"""Train ResNet18 with 2-bit weights and 8-bit activations: `make train-lowbit`, or on several processes or GPUs

    torchrun --nproc-per-node 2 -m course_utils.tools.lowbit
    torchrun --nproc-per-node 4 -m course_utils.tools.lowbit --device cuda

Starts from the course's float32 network, and goes on where it was after a stop. The result is packed into
`data/checkpoints/resnet18_w2a8.safetensors`, which `int4.load_packed` reads, with an entry in the manifest.
"""

import argparse
import contextlib
import os
import time
from dataclasses import asdict, dataclass

import torch
from torch import distributed
from tqdm import tqdm

from course_utils import cpu, data, files, int4, measure, models, qat, training
from course_utils.simulate import Policy

MODEL = "resnet18"
POLICY = Policy(weights=2, activations=8, clip="mse", first_last=8)
TARGET = "checkpoints/resnet18_w2a8.safetensors"


@dataclass(frozen=True)
class Recipe:
    """The settings of `training.finetune`; goes into the manifest as it stands."""

    steps: int = 2000
    batch_size: int = 64  # of all processes together
    lr: float = 0.01
    freeze_at: float = 0.8
    seed: int = 0
    shift: int = 1
    label_smoothing: float = 0.1
    bf16: bool = True


def train(recipe, *, device="cpu", progress=True):
    """Return `(quantized network, seconds of training)`; resumes after a kill."""
    calibration = data.batches(data.fashion_mnist("calibration"), 32, limit=256)
    # Learned in the first and last layer too, as in the network that is stored.
    prepared = qat.prepare(models.load(MODEL), POLICY, calibration, scales="learned")
    resume = files.data_dir() / "checkpoints/resnet18_w2a8.resume.pt"
    bar = tqdm(total=recipe.steps, desc=f"{MODEL} W2A8", unit="step", mininterval=2, disable=not progress)

    def show(step, model):
        bar.update(step + 1 - bar.n)

    history = training.finetune(
        prepared, data.fashion_mnist("train"), device=device, resume=resume, on_step=show, **asdict(recipe)
    )
    bar.close()
    return qat.convert(prepared), sum(seconds for _, seconds in history)


def publish(quantized, recipe, seconds):
    """Store the network packed, with a manifest entry, and return how it compares with the float32 one on the test images."""
    int4.save_packed(quantized, files.data_dir() / TARGET)
    test = data.batches(data.fashion_mnist("test"), 100)
    comparison = measure.compare(models.load(MODEL), int4.load_packed(files.data_dir() / TARGET), test)
    score = comparison.second
    files.update_manifest(
        TARGET,
        licence="MIT, as the data and the architecture's code (torchvision, BSD-3-Clause)",
        origin="trained by `make train-lowbit` from checkpoints/resnet18.safetensors and the FashionMNIST files in this folder",
        recipe=asdict(recipe),
        policy=str(POLICY),
        seconds=round(seconds),
        machine=measure.machine(),
        accuracy={"test": score.value, "low": score.low, "high": score.high, "n": score.n, "confidence": 0.95},
    )
    return comparison


@contextlib.contextmanager
def process_group(device):
    """Join the processes that `torchrun` started, if it did; yield this one's rank and its device."""
    if "RANK" not in os.environ:
        yield 0, device
        return
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        local = int(os.environ["LOCAL_RANK"])
        yield distributed.get_rank(), f"cuda:{local}" if device == "cuda" else device
        distributed.barrier()  # a process that leaves while others still work would take them down
    finally:
        distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    device = parser.parse_args().device
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: leave --device out to train on the CPU")
    recipe = Recipe(bf16=device != "cpu" or cpu.has_bf16())
    with process_group(device) as (rank, device):
        began = time.perf_counter()
        quantized, seconds = train(recipe, device=device, progress=rank == 0)
        if rank == 0:
            print(
                f"{publish(quantized, recipe, seconds)}\n{(time.perf_counter() - began) / 60:.1f} min → data/{TARGET}"
            )


if __name__ == "__main__":
    main()
