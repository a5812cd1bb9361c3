"""Train the arms of notebook 03: `make arms`, or `python -m course_utils.tools.arms [model ...]`.

Each arm is trained with several seeds; all arms of one seed see the same images in the same order for the same number of
steps. What the trained networks predict is kept in `data/arms.safetensors`, so that any two can be compared image by image,
with the checksum of the network that all of them started from. A run that was stopped goes on with the next arm; arms of a
network that was trained again are trained again.
"""

import json
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from course_utils import data, files, measure, models, qat, simulate, training
from course_utils.simulate import Policy
from course_utils.tools import names_from_command_line

FILE = "arms.safetensors"
SEEDS = (0, 1, 2)
STEPS, LR = 200, 0.002  # the rate chosen on validation images
FEW = {"clip": "mse", "observer": "mse", "first_last": 8}
W8A8, W4A8 = Policy(weights=8, activations=8), Policy(weights=4, activations=8)
W4A4 = Policy(weights=4, activations=4, **FEW)
W3A8 = Policy(weights=3, activations=8)
W2A8 = Policy(weights=2, activations=8, clip="mse", first_last=8)
POLICIES = {"resnet18": (W8A8, W4A8, W3A8, W4A4, W2A8), "mobilenet_v2": (W4A8, W4A4)}
# Few bits have further to go; and where PTQ is close already, large steps lead away first. So do they for the control.
OTHERWISE = {("resnet18", W4A4): (1000, 0.0007), ("resnet18", W2A8): (400, LR)}
SETTINGS = {"shift": 1, "label_smoothing": 0.1}  # as the networks were trained, and for all arms alike
BF16 = ("resnet18",)  # pays where dense convolutions dominate
CURVE = (10, 30, 100)  # steps of the shorter trainings, of MobileNetV2 at W4A8, scored on validation images

FP32, PTQ = "FP32", "PTQ"  # not trained
CONTROL, CONTROL_PTQ = "FP32 fine-tuned", "FP32 fine-tuned, then PTQ"
STATISTICS, QAT = "PTQ, batch norms re-estimated", "QAT"
OBSERVED, LEARNED = "QAT, observed scales", "QAT, learned scales"  # at 8 bits, where it matters which are learned
SCALES = {STATISTICS: "mixed", QAT: "mixed", OBSERVED: "observed", LEARNED: "learned"}
# Where PTQ falls: how much comes back by fine-tuning without quantization, how much by batch-norm statistics alone.
CONTROLLED = ("mobilenet_v2", W4A8)


@dataclass(frozen=True)
class Arm:
    """One network: `model` treated as `arm` says, under `policy`, with so many `steps`, `seed` and `lr`, scored on `split`."""

    model: str
    arm: str
    policy: Policy | None = None
    steps: int = 0
    seed: int | None = None
    split: str = "test"
    lr: float = LR


def training_of(name, policy):
    """Return `(steps, lr)` of the arms of model `name` under `policy`, the control among them."""
    return OTHERWISE.get((name, policy), (STEPS, LR))


def wanted(name):
    """Return all `Arm`s of model `name`; those that share a training follow one another."""
    trainings = [("test", {policy: training_of(name, policy) for policy in POLICIES[name]})]
    if name == CONTROLLED[0]:
        trainings += [("validation", {CONTROLLED[1]: (few, LR)}) for few in CURVE]
    found = []
    for split, settings in trainings:
        found += [Arm(name, FP32, split=split), *(Arm(name, PTQ, policy, split=split) for policy in settings)]
        for seed in SEEDS:
            found += [Arm(name, CONTROL, None, n, seed, split, lr) for n, lr in sorted(set(settings.values()))]
            for policy, (n, lr) in settings.items():
                found += [Arm(name, kind, policy, n, seed, split, lr) for kind in kinds(name, policy)]
    return list(dict.fromkeys(found))


def kinds(name, policy):
    """Return what is trained under `policy` besides the float32 control."""
    if (name, policy) == CONTROLLED:
        return CONTROL_PTQ, STATISTICS, QAT
    return (QAT, OBSERVED, LEARNED) if policy == W8A8 else (QAT,)


class Trainer:
    """Makes the networks of arms; keeps the last fine-tuned FP32 network, which several arms start from."""

    def __init__(self):
        self.calibration = data.batches(data.fashion_mnist("calibration"), 32, limit=256)
        self.images = data.fashion_mnist("train")
        self.control = None, None

    def make(self, arm):
        """Return the network of `arm`, in evaluation mode."""
        model = models.load(arm.model)
        if arm.arm in (CONTROL, CONTROL_PTQ):
            model = self._control(arm, model)
        if arm.arm in (PTQ, CONTROL_PTQ):
            return simulate.quantize(model, arm.policy, self.calibration)
        if arm.arm in SCALES:
            model = qat.prepare(model, arm.policy, self.calibration, scales=SCALES[arm.arm])
            # Without a learning rate nothing learns, but batch norms see the same images and follow them.
            self._finetune(model, arm, lr=0.0 if arm.arm == STATISTICS else arm.lr)
            return qat.convert(model)
        return model.eval()

    def _control(self, arm, model):
        key = arm.model, arm.steps, arm.seed, arm.lr
        if self.control[0] != key:
            self._finetune(model, arm, lr=arm.lr)
            self.control = key, model.eval()
        return self.control[1]

    def _finetune(self, model, arm, *, lr):
        training.finetune(model, self.images, steps=arm.steps, seed=arm.seed, lr=lr, bf16=arm.model in BF16, **SETTINGS)


def make(arm):
    """Return the network of `arm`, in evaluation mode, trained if need be."""
    return Trainer().make(arm)


def predictions(arm, model):
    """Return the classes, int64 `(images,)`, that `model` predicts for the images of the arm's split."""
    return measure.predictions(model, data.batches(data.fashion_mnist(arm.split), 100))[0]


def read():
    """Return `Arm` → predicted classes, int64 `(images,)`; arms of networks that have changed since are left out.

    Raises `DataFileError` when there is no such file, or it is damaged.
    """
    path = files.data_dir() / FILE
    if not path.exists():
        raise files.DataFileError(f"{path} is missing: restore it with git, or train its networks with `make arms`")
    try:
        with safe_open(path, framework="pt") as file:
            listed = json.loads(file.metadata()["arms"])
            found = {
                _arm(row["arm"]): (_classes(file.get_tensor(key)), row["checkpoint"]) for key, row in listed.items()
            }
    except Exception as error:  # safetensors raises its own type, and a damaged list leads to many
        raise files.DataFileError(
            f"{path} is damaged ({error}): restore it with git, or delete it and run `make arms`"
        ) from None
    current = {name: _checksum(name) for name in POLICIES}
    return {arm: classes for arm, (classes, checkpoint) in found.items() if checkpoint == current[arm.model]}


def _arm(row):
    if row["model"] not in POLICIES:
        raise ValueError(f"there is no network {row['model']!r}")
    return Arm(**row | {"policy": row["policy"] and Policy(**row["policy"])})


def _classes(stored):
    if stored.dtype != torch.uint8 or stored.ndim != 1:
        raise ValueError(f"predictions are {stored.dtype} of shape {tuple(stored.shape)}, expected one byte an image")
    return stored.long()


def _row(arm):
    policy = arm.policy and {k: v for k, v in vars(arm.policy).items() if v != getattr(Policy(), k)}
    return {"arm": vars(arm) | {"policy": policy}, "checkpoint": _checksum(arm.model)}


def _write(found):
    keys = [f"{number:03}" for number in range(len(found))]
    tensors = {key: classes.to(torch.uint8) for key, classes in zip(keys, found.values(), strict=True)}
    listed = {key: _row(arm) for key, arm in zip(keys, found, strict=True)}
    metadata = {"arms": listed, "settings": SETTINGS | {"batch_size": 32}, "machine": measure.machine()}
    with files.replacing(files.data_dir() / FILE) as partial:
        save_file(tensors, partial, metadata={key: json.dumps(value) for key, value in metadata.items()})


def _checksum(name):
    return files.read_manifest()[models.checkpoint(name)]["sha256"]


def main():
    names = names_from_command_line(__doc__, POLICIES, "networks to train")
    every = {arm for name in POLICIES for arm in wanted(name)}
    found = read() if (files.data_dir() / FILE).exists() else {}
    found = {arm: classes for arm, classes in found.items() if arm in every}  # not those of another recipe
    trainer = Trainer()
    for arm in (bar := tqdm([arm for name in names for arm in wanted(name) if arm not in found], unit="network")):
        found[arm] = predictions(arm, trainer.make(arm))
        _write(found)
        right = (found[arm] == data.fashion_mnist(arm.split).labels).double().mean()
        how = f"{arm.arm}, {arm.steps} steps at {arm.lr:g}, seed {arm.seed}"
        bar.write(f"{arm.model}, {arm.policy}, {how}, {arm.split}: {right:.2%}")


if __name__ == "__main__":
    main()
