import copy
import math

import pytest
import torch
from torch import nn

from course_utils import backends, data, qat


def tiny():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)]
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def some():
    return data.fashion_mnist("train", size=28).subset(slice(2000))


@pytest.mark.parametrize("prepare", [lambda model: model, backends.prepare_qat], ids=["float", "quantization-aware"])
def test_real_images_are_learned(some, prepare):
    history = qat.finetune(prepare(tiny()), some, steps=80, lr=0.02)
    losses = [loss for loss, _ in history]
    assert sum(losses[:5]) / 5 > 1.5  # guessing among ten classes costs log(10) = 2.3
    assert sum(losses[-20:]) / 20 < 0.8
    assert len(history) == 80 and all(seconds > 0 for _, seconds in history)


def test_the_seed_decides_everything(some):
    runs = []
    for seed in (3, 3, 4):
        torch.rand(seed)  # the global generator has no say
        model = tiny()
        torch.rand(seed)
        losses = [loss for loss, _ in qat.finetune(model, some, steps=4, seed=seed)]
        runs.append((losses, model[0].weight))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_about_half_of_the_images_are_mirrored_and_keep_their_labels(some):
    seen = []

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(10))

        def forward(self, x):
            seen.extend(x)
            return self.weight.expand(len(x), 10)

    qat.finetune(Looks(), some.subset(slice(1)), steps=4, batch_size=50)
    plain = data.preprocess(some.pixels[:1], 28)[0]
    straight = sum(torch.equal(x, plain) for x in seen)
    mirrored = sum(torch.equal(x, plain.flip(2)) for x in seen)
    assert straight + mirrored == 200 and 70 < mirrored < 130


def test_after_the_freeze_ranges_and_statistics_stand_still_and_weights_do_not(some):
    snapshots = []

    def look(step, model):
        state = copy.deepcopy(model.state_dict())
        ranges = {k: v for k, v in state.items() if k.endswith((".min_val", ".max_val", "running_mean", "running_var"))}
        snapshots.append((ranges, state["0.weight"]))

    qat.finetune(backends.prepare_qat(tiny()), some, steps=6, lr=0.05, freeze_at=0.5, on_step=look)
    assert len(snapshots) == 6 and len(snapshots[0][0]) >= 8
    for step in range(1, 6):
        (before, weight_before), (after, weight_after) = snapshots[step - 1], snapshots[step]
        same = [torch.equal(before[key], after[key]) for key in before]
        assert all(same) if step >= 3 else not all(same)
        assert not torch.equal(weight_before, weight_after)


def test_freezing_at_one_freezes_nothing(some):
    model = tiny()
    qat.finetune(model, some, steps=3, freeze_at=1.0)
    assert model[1].training


def test_the_learning_rate_falls_to_almost_nothing(some, monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    qat.finetune(tiny(), some, steps=10, batch_size=4, lr=0.5)
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(some, steps):
    with pytest.raises(ValueError, match="steps"):
        qat.finetune(tiny(), some, steps=steps)
