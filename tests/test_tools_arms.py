"""The arms' file: whole, resumable, and never about another network than the one that is here."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from course_utils import data, files, models
from course_utils.simulate import Policy
from course_utils.tools import arms


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with a manifest of two checkpoints and no arms yet."""
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    manifest = {f"checkpoints/{name}.safetensors": {"bytes": 1, "sha256": f"sum of {name}"} for name in arms.POLICIES}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


PTQ = arms.Arm("resnet18", arms.PTQ, Policy(weights=4, layers={"fc": 8}))
TRAINED = arms.Arm("mobilenet_v2", arms.QAT, arms.W4A8, 10, 2, "validation")
CONTROL = arms.Arm("resnet18", arms.CONTROL, None, 10, 0)


def test_what_was_predicted_is_read_back(folder):
    found = {arm: torch.randint(10, (50,)) for arm in (PTQ, TRAINED, CONTROL)}
    arms._write(found)
    again = arms.read()
    assert list(again) == list(found) and all(torch.equal(again[arm], found[arm]) for arm in found)


def test_arms_of_a_network_trained_again_are_left_out(folder):
    arms._write({arm: torch.zeros(5, dtype=torch.int64) for arm in (PTQ, TRAINED)})
    manifest = files.read_manifest()
    manifest["checkpoints/resnet18.safetensors"]["sha256"] = "another"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert list(arms.read()) == [TRAINED]


@pytest.mark.parametrize("content", [b"", b"hello", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_file_is_named_with_the_way_out(folder, content):
    (folder / arms.FILE).write_bytes(content)
    with pytest.raises(files.DataFileError, match=r"arms\.safetensors is damaged .*make arms"):
        arms.read()


def test_a_missing_file_is_named_with_the_way_out(folder):
    with pytest.raises(files.DataFileError, match=r"arms\.safetensors is missing.*make arms"):
        arms.read()


def test_an_unknown_network_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["arms", "vgg"])
    with pytest.raises(SystemExit):
        arms.main()
    assert "choose from resnet18, mobilenet_v2" in capsys.readouterr().err


def test_a_stopped_run_goes_on_where_it_was(folder, monkeypatch):
    made = []

    class Trainer:
        def make(self, arm):
            made.append(arm)
            if len(made) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["arms", "resnet18"])
    monkeypatch.setattr(arms, "Trainer", Trainer)
    labels = SimpleNamespace(labels=torch.zeros(10_000))
    monkeypatch.setattr(arms.data, "fashion_mnist", lambda split: labels)
    monkeypatch.setattr(arms, "predictions", lambda arm, model: torch.zeros(10_000, dtype=torch.int64))
    with pytest.raises(KeyboardInterrupt):
        arms.main()
    arms.main()
    wanted = arms.wanted("resnet18")
    assert sorted(map(str, set(made))) == sorted(map(str, wanted)) and len(made) == len(wanted) + 1
    arms.main()
    assert len(made) == len(wanted) + 1
    monkeypatch.setattr("sys.argv", ["arms"])
    arms.main()
    assert made[len(wanted) + 1 :] == arms.wanted("mobilenet_v2")


@pytest.mark.parametrize("name", arms.POLICIES)
def test_every_trained_arm_has_a_control_with_the_same_steps_and_seed(name):
    wanted = arms.wanted(name)
    assert len(set(wanted)) == len(wanted)
    controls = {(a.steps, a.seed, a.split) for a in wanted if a.arm == arms.CONTROL}
    trained = {(a.steps, a.seed, a.split) for a in wanted if a.arm == arms.QAT}
    assert trained == controls and {seed for _, seed, _ in trained} == set(arms.SEEDS) and len(arms.SEEDS) >= 3


def test_each_arm_is_made_of_the_network_it_names(monkeypatch):
    """With steps that do nothing, every arm is the network it starts from, quantized or not."""
    steps = []

    def finetune(model, images, **settings):
        steps.append(settings)
        model.eval()

    monkeypatch.setattr(arms.training, "finetune", finetune)
    trainer, w8 = arms.Trainer(), Policy(weights=8)
    x = torch.randn(2, 3, 64, 64)
    rest = (7, 1)
    with torch.no_grad():
        plain, rounded = (trainer.make(arms.Arm("resnet18", *a))(x) for a in ((arms.FP32,), (arms.PTQ, w8)))
        assert not torch.equal(plain, rounded)
        assert torch.equal(trainer.make(arms.Arm("resnet18", arms.CONTROL, None, *rest))(x), plain)
        assert torch.equal(trainer.make(arms.Arm("resnet18", arms.CONTROL_PTQ, w8, *rest))(x), rounded)
        assert len(steps) == 1  # one control serves both
        torch.testing.assert_close(
            trainer.make(arms.Arm("resnet18", arms.QAT, w8, *rest))(x), rounded, rtol=1e-3, atol=1e-3
        )
        trainer.make(arms.Arm("resnet18", arms.STATISTICS, w8, *rest))
    assert [s["lr"] for s in steps] == [arms.LR, arms.LR, 0.0]
    assert all(s["steps"] == 7 and s["seed"] == 1 and s["bf16"] for s in steps)


def test_predictions_are_of_the_split_that_the_arm_is_scored_on(monkeypatch):
    whole = data.fashion_mnist
    monkeypatch.setattr(
        arms.data,
        "fashion_mnist",
        lambda split: replace(whole(split), pixels=whole(split).pixels[:20], labels=whole(split).labels[:20]),
    )
    for name, split in (("resnet18", "test"), ("mobilenet_v2", "validation")):
        network = arms.make(arms.Arm(name, arms.FP32, split=split))
        found = arms.predictions(arms.Arm(name, arms.FP32, split=split), network)
        assert not network.training and models.architecture(network)["name"] == name
        with torch.no_grad():
            assert torch.equal(found, models.load(name)(data.preprocess(whole(split).pixels[:20], 64)).argmax(1))


def test_the_stored_arms_are_those_of_the_networks_that_are_here():
    found = arms.read()
    for name in arms.POLICIES:
        assert set(arms.wanted(name)) == {arm for arm in found if arm.model == name}, "run `make arms`"
    assert all(len(classes) == 10_000 for arm, classes in found.items() if arm.split == "test")
