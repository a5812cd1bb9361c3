import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from course_utils import backends, data, qat, training
from course_utils.simulate import Policy


def tiny(dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(8 * 8 * 8, 10))


@pytest.fixture(scope="module")
def some():
    return data.fashion_mnist("train", size=28).subset(slice(2000))


def own_qat(model):
    return qat.prepare(model, Policy(weights=4))


@pytest.mark.parametrize(
    "prepare", [lambda model: model, backends.prepare_qat, own_qat], ids=["float", "library", "own"]
)
def test_real_images_are_learned(some, prepare):
    history = training.finetune(prepare(tiny()), some, steps=80, lr=0.02)
    losses = [loss for loss, _ in history]
    assert sum(losses[:5]) / 5 > 1.5  # guessing among ten classes costs log(10) = 2.3
    assert sum(losses[-20:]) / 20 < 0.8
    assert len(history) == 80 and all(seconds > 0 for _, seconds in history)


def test_the_seed_decides_everything(some):
    runs = []
    for seed in (3, 3, 4):
        torch.rand(seed)  # the global generator has no say
        model = tiny(dropout=0.3)
        torch.rand(seed)
        losses = [loss for loss, _ in training.finetune(model, some, steps=4, seed=seed, shift=1)]
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

    training.finetune(Looks(), some.subset(slice(1)), steps=4, batch_size=50)
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

    training.finetune(backends.prepare_qat(tiny()), some, steps=6, lr=0.05, freeze_at=0.5, on_step=look)
    assert len(snapshots) == 6 and len(snapshots[0][0]) >= 8
    for step in range(1, 6):
        (before, weight_before), (after, weight_after) = snapshots[step - 1], snapshots[step]
        same = [torch.equal(before[key], after[key]) for key in before]
        assert all(same) if step >= 3 else not all(same)
        assert not torch.equal(weight_before, weight_after)


def test_freezing_at_one_freezes_nothing(some):
    model = tiny()
    seen = model[1].num_batches_tracked.item()
    training.finetune(model, some, steps=3, freeze_at=1.0)
    assert model[1].training and model[1].num_batches_tracked == seen + 3


def test_the_learning_rate_falls_to_almost_nothing(some, monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    training.finetune(tiny(), some, steps=10, batch_size=4, lr=0.5)
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(some, steps):
    with pytest.raises(ValueError, match="steps"):
        training.finetune(tiny(), some, steps=steps)


def test_bf16_learns_as_well(some):
    history = training.finetune(tiny(), some, steps=60, lr=0.02, bf16=True)
    assert sum(loss for loss, _ in history[-10:]) / 10 < 1.0


# Stopped, killed, diverged


def test_a_loss_that_is_no_number_stops_the_training_and_keeps_the_last_good_weights(some):
    model = tiny()
    good = {}

    def spoil(step, m):
        if step == 11:
            good.update({k: v.clone() for k, v in m.state_dict().items()})
        if step == 13:
            with torch.no_grad():
                m[0].weight.fill_(math.nan)

    with pytest.raises(training.Diverged, match=r"nan at step 14: .* weights of step 10 again") as caught:
        training.finetune(model, some, steps=30, on_step=spoil)
    assert caught.value.step == 14 and caught.value.kept == 10
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("scales", [None, *qat.SCALES])
def test_a_learning_rate_that_is_far_too_high_is_noticed(some, scales):
    policy, calibration = Policy(weights=4, activations=8), data.batches(some, 50, limit=50)
    model = tiny() if scales is None else qat.prepare(tiny(), policy, calibration, scales=scales)
    with pytest.raises(training.Diverged, match="smaller lr than 1e\\+38"):
        training.finetune(model, some, steps=50, lr=1e38)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_at", [2, 5, 8])
@pytest.mark.parametrize("prepare", [lambda model: model, own_qat], ids=["float", "quantization-aware"])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(some, tmp_path, killed_at, prepare):
    settings = {"steps": 9, "lr": 0.05, "freeze_at": 0.5, "shift": 1, "save_every": 2}
    whole = prepare(tiny(dropout=0.3))
    expected = training.finetune(whole, some, **settings)
    path = tmp_path / "tuning.pt"

    def kill(step, model):
        if step == killed_at:
            raise Killed

    with pytest.raises(Killed):
        training.finetune(prepare(tiny(dropout=0.3)), some, resume=path, on_step=kill, **settings)
    assert path.exists()
    torch.rand(7)
    again = prepare(tiny(dropout=0.3))
    steps = []
    history = training.finetune(again, some, resume=path, on_step=lambda step, m: steps.append(step), **settings)
    assert steps[0] == killed_at // 2 * 2 and not path.exists()
    assert [loss for loss, _ in history] == [loss for loss, _ in expected]
    for ours, theirs in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def killed_training(images, path):
    """Leave in `path` what a training that was killed at its step 3 of 5 had saved; return `path`."""

    def kill(step, model):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        training.finetune(tiny(), images, steps=5, resume=path, save_every=2, on_step=kill)
    return path


def test_the_file_of_another_training_is_refused(some, tmp_path):
    path = killed_training(some, tmp_path / "tuning.pt")
    with pytest.raises(ValueError, match=r"another training \(lr was 0.002, now 0.1\)"):
        training.finetune(tiny(), some, steps=5, lr=0.1, resume=path)
    with pytest.raises(ValueError, match=r"another training \(policy was None, now W4 .*\)"):
        training.finetune(own_qat(tiny()), some, steps=5, resume=path)
    assert path.exists()


def test_the_file_of_other_images_or_of_another_network_is_refused_before_anything_is_loaded(some, tmp_path):
    path = killed_training(some, tmp_path / "tuning.pt")
    relabelled = data.Images(some.pixels, some.labels.roll(1), some.size)
    for images in (some.subset(slice(1000)), relabelled, data.Images(some.pixels, some.labels, 32)):
        with pytest.raises(ValueError, match=r"another training \(images was \w{12}, now \w{12}\)"):
            training.finetune(tiny(), images, steps=5, resume=path)
    other = tiny()
    other[5] = nn.Linear(8 * 8 * 8, 11)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"another training \(parameters was \w{12}, now \w{12}\)"):
        training.finetune(other, some, steps=5, resume=path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_a_file_that_does_not_say_of_which_images_it_is_is_refused(some, tmp_path):
    path = killed_training(some, tmp_path / "tuning.pt")
    state = training.read_state(path)
    del state["settings"]["images"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"another training \(images was None, now \w{12}\).* delete it to start anew"):
        training.finetune(tiny(), some, steps=5, resume=path)


def test_a_network_whose_observers_have_seen_images_goes_on_too(some, tmp_path):
    path, model = tmp_path / "tuning.pt", backends.prepare_qat(tiny())

    def kill(step, model):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        training.finetune(model, some, steps=5, resume=path, save_every=2, on_step=kill)
    assert len(training.finetune(model, some, steps=5, resume=path)) == 5


@pytest.mark.parametrize("ending", ["the end", "divergence", "a kill"])
def test_the_model_comes_back_to_the_cpu_however_training_ends(some, ending):
    model, places = tiny(), []
    to = model.to
    model.to = lambda device, **options: places.append(device) or to(device, **options)

    def stop(step, model):
        raise Killed

    if ending == "the end":
        training.finetune(model, some, steps=1)
    else:
        with pytest.raises(Killed if ending == "a kill" else training.Diverged):
            training.finetune(model, some, steps=5, lr=1e38, on_step=stop if ending == "a kill" else None)
    assert places == ["cpu", "cpu"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "a list", "a flipped bit"])
def test_a_damaged_file_is_named_with_the_way_on_and_kept(some, tmp_path, damage):
    path = killed_training(some, tmp_path / "tuning.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "a list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(
            {"truncated": content[:-100], "empty": b"", "text": b"hello", "a flipped bit": content}[damage]
        )
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match="tuning.pt is damaged, or not the state of a training: delete it to start anew"
    ):
        training.finetune(tiny(), some, steps=5, resume=path)
    assert path.read_bytes() == before


# Several processes

SCRIPT = """
import sys, torch
from torch import distributed
from course_utils import data, qat, training
from course_utils.simulate import Policy
from course_utils.tools.lowbit import process_group
from tests.test_training import tiny

torch.set_num_threads(1)
some = data.fashion_mnist("train", size=28).subset(slice(2000))
calibration = data.batches(some, 50, limit=100)
with process_group("cpu") as (rank, device):
    assert (distributed.get_world_size() if distributed.is_initialized() else 1) == int(sys.argv[2])
    prepared = qat.prepare(tiny(), Policy(weights=4, activations=8), calibration)
    history = training.finetune(prepared, some, steps=12, lr=0.02, freeze_at=0.0, device=device)
    if rank == 0:
        torch.save({"state": prepared.state_dict(), "losses": [loss for loss, _ in history]}, sys.argv[1])
"""


def test_two_processes_train_the_network_that_one_trains(tmp_path, pytestconfig):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launchers = {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    found = {}
    for processes, launcher in launchers.items():
        path = tmp_path / f"{processes}.pt"
        command = [sys.executable, *launcher, str(script), str(path), str(processes)]
        environment = {"PYTHONPATH": str(pytestconfig.rootpath), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | environment)
        assert run.returncode == 0, run.stderr[-2000:]
        found[processes] = torch.load(path, weights_only=True)
    # The sums of gradients are taken in another order: float32 rounding, not more.
    assert found[2]["losses"] == pytest.approx(found[1]["losses"], rel=1e-4)
    for key, one in found[1]["state"].items():
        torch.testing.assert_close(found[2]["state"][key], one, rtol=1e-3, atol=1e-4, msg=key)


def test_a_batch_that_processes_cannot_share_is_refused(some, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="32 images cannot be shared by 3 processes"):
        training.finetune(tiny(), some, steps=1)


@pytest.mark.parametrize("here", [True, False])
def test_bf16_is_taken_only_where_the_processor_computes_in_it(here, some, monkeypatch):
    monkeypatch.setattr(training.cpu, "has_bf16", lambda: here)
    dtypes = []
    model = tiny()
    model.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    training.finetune(model, some, steps=1, bf16=True)
    assert dtypes == [torch.bfloat16 if here else torch.float32]
