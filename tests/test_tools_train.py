import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from course_utils import data, files, measure, models
from course_utils.stats import Proportion
from course_utils.tools import train

CYCLES = (train.Cycle((14, 20), max_lr=0.1), train.Cycle((20,), max_lr=0.03))
RECIPE = train.Recipe(CYCLES, bf16=False, weight_decay=1e-4, batch_size=16)


class Stub(nn.Module):
    """A network in miniature, with everything that carries state or draws random numbers: batch norm and dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(6, 10))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def build_stubs(monkeypatch, dropout=0.0):
    monkeypatch.setattr(models, "build", lambda name: Stub(dropout))


def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("shift", [0, 2])
def test_every_image_is_moved_and_mirrored_as_a_slow_loop_does_it(shift):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(1, 256, (5, 5), dtype=torch.uint8, generator=generator)
    padded = F.pad(image, (shift,) * 4)
    possible = []
    for dy in range(2 * shift + 1):
        for dx in range(2 * shift + 1):
            moved = padded[dy : dy + 5, dx : dx + 5]
            possible += [moved.numpy().tobytes(), moved.flip(1).numpy().tobytes()]
    n = 40 * len(possible)
    found = [x.numpy().tobytes() for x in data.augment(image.expand(n, 5, 5), shift, generator)]
    assert set(found) == set(possible)
    assert all(15 < found.count(each) < 80 for each in possible)


def test_images_do_not_mix_and_the_originals_stay():
    pixels = torch.arange(1, 101, dtype=torch.uint8)[:, None, None].expand(100, 6, 6).clone()
    before = pixels.clone()
    found = data.augment(pixels, 2, torch.Generator().manual_seed(0))
    assert torch.equal(pixels, before) and found.dtype == torch.uint8
    for i, image in enumerate(found):
        assert set(image.unique().tolist()) <= {0, i + 1} and image.max() == i + 1


def test_augmentation_depends_on_the_generator_only():
    pixels = torch.randint(0, 256, (20, 8, 8), dtype=torch.uint8)
    first, second, other = (data.augment(pixels, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_training_learns_and_is_the_same_each_time(tiny_data, monkeypatch):
    build_stubs(monkeypatch)
    runs = []
    for noise in (1, 2):
        torch.rand(noise)
        runs.append(train.train("resnet18", RECIPE, progress=False))
        (tiny_data / "checkpoints" / "resnet18.resume.pt").unlink()
    (first, seconds), (second, _) = runs
    assert equal(first, second) and not first.training and seconds > 0
    torch.manual_seed(RECIPE.seed)
    assert not equal(first, Stub())


@pytest.mark.parametrize("killed_in", [2, 3], ids=["killed within a cycle", "killed after a cycle"])
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["without dropout", "with dropout"])
def test_a_killed_and_resumed_training_ends_with_the_same_bits(tiny_data, monkeypatch, capsys, dropout, killed_in):
    build_stubs(monkeypatch, dropout)
    resume_file = tiny_data / "checkpoints" / "mobilenet_v2.resume.pt"
    expected, _ = train.train("mobilenet_v2", RECIPE, progress=False)
    resume_file.unlink()

    augment, calls = data.augment, []

    def killed(pixels, shift, generator):
        calls.append(1)
        if len(calls) == 3 * (killed_in - 1) + 2:  # three steps make an epoch, so this is in the middle of one
            raise KeyboardInterrupt
        return augment(pixels, shift, generator)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "augment", killed)
        train.train("mobilenet_v2", RECIPE, progress=False)
    assert resume_file.exists()
    capsys.readouterr()

    resumed, seconds = train.train("mobilenet_v2", RECIPE, progress=False)
    assert f"resuming after epoch {killed_in - 1}" in capsys.readouterr().out
    assert equal(resumed, expected) and seconds > 0


def test_a_finished_training_that_was_killed_before_publishing_is_not_repeated(tiny_data, monkeypatch):
    build_stubs(monkeypatch)
    expected, seconds = train.train("resnet18", RECIPE, progress=False)
    monkeypatch.setattr(data, "augment", lambda *args: pytest.fail("trained again"))
    found, seconds_again = train.train("resnet18", RECIPE, progress=False)
    assert equal(found, expected) and seconds_again == seconds and not found.training


def test_another_recipe_starts_anew(tiny_data, monkeypatch, capsys):
    build_stubs(monkeypatch)
    first, _ = train.train("resnet18", RECIPE, progress=False)
    other, _ = train.train("resnet18", dataclasses.replace(RECIPE, weight_decay=1e-3), progress=False)
    assert "resuming" not in capsys.readouterr().out and not equal(first, other)


def test_the_last_epochs_learn_at_a_falling_rate_and_each_at_its_size(tiny_data, monkeypatch):
    build_stubs(monkeypatch)
    seen = []
    step = torch.optim.SGD.step

    def watched(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    sizes = []
    forward = Stub.forward
    monkeypatch.setattr(Stub, "forward", lambda self, x: sizes.append((self.training, x.shape[-1])) or forward(self, x))
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    train.train("resnet18", RECIPE, progress=False)
    assert [size for training, size in sizes if training] == [14] * 3 + [20] * 6
    assert {size for training, size in sizes if not training} == {20}
    assert max(seen[:6]) == pytest.approx(0.1, rel=0.05) and max(seen[6:]) == pytest.approx(0.03, rel=0.05)
    assert seen[5] < 0.001 and seen[8] < 0.001


def test_bf16_training_works(tiny_data, monkeypatch):
    build_stubs(monkeypatch)
    model, _ = train.train("resnet18", dataclasses.replace(RECIPE, bf16=True), progress=False)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


def test_a_published_model_is_loaded_with_the_accuracy_that_its_entry_states(tiny_data, monkeypatch):
    build_stubs(monkeypatch)
    model, seconds = train.train("resnet18", RECIPE, progress=False)
    after = train.publish("resnet18", model, RECIPE, seconds)
    entry = files.read_manifest()["checkpoints/resnet18.safetensors"]
    assert entry["accuracy"] | {"test": after.value, "low": after.low, "high": after.high, "n": 20} == entry["accuracy"]
    assert entry["recipe"] == json.loads(json.dumps(dataclasses.asdict(RECIPE)))
    assert {"bytes", "sha256", "licence", "origin", "seconds", "machine"} <= entry.keys()
    stored = load_file(tiny_data / "checkpoints" / "resnet18.safetensors")
    assert {v.dtype for v in stored.values() if v.is_floating_point()} == {torch.float16}
    test = data.fashion_mnist("test", size=RECIPE.size)
    assert measure.accuracy(models.load("resnet18"), data.batches(test, 8)) == after
    assert not list((tiny_data / "checkpoints").glob("*resume*"))


@pytest.mark.parametrize(
    ("weight_scale", "variance", "storage"),
    [(100.0, 1.0, "FP16"), (100.0, 1e8, "FP16, batch norm FP32"), (1e9, 1.0, "FP32")],
)
def test_no_test_image_is_lost_to_half_precision(tiny_data, weight_scale, variance, storage):
    test = list(data.batches(data.fashion_mnist("test", size=28), 20))
    x = test[0][0].flatten(1)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(x.shape[1]), nn.Linear(x.shape[1], 10, bias=False)).eval()
    # It knows every test image by heart, with numbers that FP16 may have no room for.
    by_heart = torch.linalg.pinv(x.double()) @ F.one_hot(test[0][1]).double()
    model[2].weight.data = (weight_scale * by_heart.T).float()
    model[1].running_var.fill_(variance)
    model[1].weight.data.fill_(variance**0.5)
    assert measure.accuracy(model, test) == Proportion(20, 20)
    recipe = train.Recipe((train.Cycle((28,), 0.1),), bf16=False, weight_decay=0)
    assert train.publish("resnet18", model, recipe, 1.0) == Proportion(20, 20)
    assert files.read_manifest()["checkpoints/resnet18.safetensors"]["storage"] == storage
    stored = load_file(tiny_data / "checkpoints" / "resnet18.safetensors")
    assert stored["2.weight"].dtype == (torch.float32 if storage == "FP32" else torch.float16)
    assert stored["1.running_var"].dtype == (torch.float16 if storage == "FP16" else torch.float32)


def test_every_model_has_a_recipe_that_ends_at_the_size_it_is_used_at():
    assert set(train.RECIPES) == set(models.NAMES)
    assert {recipe.size for recipe in train.RECIPES.values()} == {data.Images.size}
    assert [recipe.epochs for recipe in (RECIPE, train.RECIPES["resnet18"])] == [3, 9]


def test_the_command_publishes_what_is_named_in_the_precision_that_pays_here(tiny_data, monkeypatch, capsys):
    build_stubs(monkeypatch)
    wanted = dataclasses.replace(RECIPE, bf16=True)
    monkeypatch.setattr(train, "RECIPES", {"resnet18": wanted, "mobilenet_v2": RECIPE})
    for names, has_bf16, expected in (
        (["resnet18"], False, {"resnet18": False}),
        ([], True, {"resnet18": True, "mobilenet_v2": False}),
    ):
        monkeypatch.setattr(train.cpu, "has_bf16", lambda has=has_bf16: has)
        monkeypatch.setattr("sys.argv", ["train", *names])
        train.main()
        said, entries = capsys.readouterr().out, files.read_manifest()
        published = {name: entries[path] for name in models.NAMES if (path := models.checkpoint(name)) in entries}
        assert {name: entry["recipe"]["bf16"] for name, entry in published.items()} == expected
        for name, entry in published.items():
            accuracy = Proportion(round(20 * entry["accuracy"]["test"]), 20)
            assert f"{name}: {accuracy} on the test set" in said and f"data/{models.checkpoint(name)}" in said


def test_an_unknown_model_is_refused_before_any_training(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "resnet18", "resnet50"])
    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("trained"))
    with pytest.raises(SystemExit):
        train.main()
    assert "unknown model 'resnet50'" in capsys.readouterr().err
