import os
import urllib.error
import urllib.request

import pytest
import torch
import torchvision

from course_utils import data, files, measure, models
from course_utils.tools import lowbit


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_181_642), ("mobilenet_v2", 2_236_682)])
def test_the_architecture_is_torchvisions_own_with_ten_classes(name, parameters):
    model = models.load(name, weights=None)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert type(model) is type(getattr(torchvision.models, name)())
    assert not model.training
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_a_model_names_the_arguments_that_build_it_again():
    model = models.build("resnet18", num_classes=7)
    assert models.architecture(model) == {"name": "resnet18", "num_classes": 7}
    assert models.build(**models.architecture(model)).fc.out_features == 7


def test_a_model_from_elsewhere_has_no_architecture_to_name():
    with pytest.raises(ValueError, match="Linear.*course_utils.models"):
        models.architecture(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("weights", ["course", "imagenet", None])
def test_an_unknown_name_is_refused_with_the_known_ones(weights):
    with pytest.raises(ValueError, match="'resnet50'.*resnet18, mobilenet_v2"):
        models.load("resnet50", weights=weights)


def test_unknown_weights_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'mine'.*course.*imagenet"):
        models.load("resnet18", weights="mine")


@pytest.mark.parametrize(("name", "at_least"), [("resnet18", 0.935), ("mobilenet_v2", 0.925)])
def test_the_committed_checkpoint_has_the_accuracy_that_its_manifest_entry_states(name, at_least):
    entry = files.read_manifest()[models.checkpoint(name)]
    stated = entry["accuracy"]
    test = data.fashion_mnist("test", size=entry["recipe"]["cycles"][-1]["sizes"][-1])
    measured = measure.accuracy(models.load(name).to(memory_format=torch.channels_last), data.batches(test, 250))
    assert measured.n == stated["n"] == 10_000
    assert abs(measured.successes - stated["test"] * 10_000) <= 5
    assert min(measured.value, stated["test"]) >= at_least
    assert (stated["low"], stated["high"]) == pytest.approx((measured.low, measured.high), abs=1e-3)
    assert entry["seconds"] > 0 and entry["licence"]


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    (tmp_path / files.MANIFEST).write_text("{}")
    path = tmp_path / models.checkpoint("resnet18")
    path.parent.mkdir()
    path.write_bytes(bytes(1000))
    files.update_manifest(models.checkpoint("resnet18"))
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(999) + (b"x" if damage == "altered" else b""))
    with pytest.raises(files.DataFileError, match="resnet18.safetensors.*git checkout.*make train"):
        models.load("resnet18")


def test_half_precision_checkpoints_become_float32(tmp_path, monkeypatch, resnet18):
    from safetensors.torch import save_file

    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    (tmp_path / files.MANIFEST).write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    half = {k: v.half() if v.is_floating_point() else v for k, v in resnet18.state_dict().items()}
    save_file(half, tmp_path / models.checkpoint("resnet18"))
    files.update_manifest(models.checkpoint("resnet18"))
    loaded = models.load("resnet18")
    assert not loaded.training
    for key, value in loaded.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(value, resnet18.state_dict()[key], rtol=1e-3, atol=1e-6)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub cache and no network."""
    before = torch.hub._hub_dir

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub._hub_dir = before


@pytest.mark.parametrize("name", models.NAMES)
def test_imagenet_weights_come_from_the_torch_hub_cache(hub, name):
    torch.manual_seed(1)
    official = torchvision.models.get_model_weights(name).DEFAULT
    placed = getattr(torchvision.models, name)(num_classes=1000).state_dict()
    hub.mkdir(parents=True)
    # torchvision checks the hash in the file's name when it downloads; what is in the cache it takes as it is.
    torch.save(placed, hub / official.url.rsplit("/", 1)[-1])
    model = models.load(name, weights="imagenet")
    assert not model.training
    assert models.architecture(model) == {"name": name, "num_classes": 1000}
    loaded = model.state_dict()
    assert loaded.keys() == placed.keys()
    assert all(torch.equal(loaded[key], placed[key]) for key in placed)


def test_without_cache_and_network_imagenet_weights_are_named_with_the_way_on(hub):
    with pytest.raises(RuntimeError) as caught:
        models.load("resnet18", weights="imagenet")
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    for words in (url.rsplit("/", 1)[-1], url, str(hub), "no route to host", 'load("resnet18")'):
        assert words in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "a web page", "empty"])
def test_a_damaged_file_in_the_hub_cache_is_named_too(hub, damage):
    hub.mkdir(parents=True)
    path = hub / torchvision.models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[-1]
    torch.save(torch.zeros(1000), path)
    content = {"truncated": path.read_bytes()[:2000], "a web page": b"<html>not found</html>", "empty": b""}
    path.write_bytes(content[damage])
    with pytest.raises(RuntimeError, match="resnet18-.*pth"):
        models.load("resnet18", weights="imagenet")


class Intruder:
    def __reduce__(self):
        return os.mkdir, (os.environ["COURSE_RESULTS"] + "-intruded",)


def test_code_in_the_hub_cache_is_not_run(hub, tmp_path):
    hub.mkdir(parents=True)
    torch.save(Intruder(), hub / torchvision.models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[-1])
    with pytest.raises(RuntimeError):
        models.load("resnet18", weights="imagenet")
    assert not list(tmp_path.glob("*-intruded"))


def test_every_committed_checkpoint_is_in_the_manifest_and_whole():
    committed = {f"checkpoints/{path.name}" for path in (files.data_dir() / "checkpoints").glob("*.safetensors")}
    assert committed == {models.checkpoint(name) for name in (*models.NAMES, models.LANGUAGE)} | {lowbit.TARGET}
    for name in committed:
        files.verified(name)
        measured = "loss" if name == models.checkpoint(models.LANGUAGE) else "accuracy"
        assert {"licence", "origin", "recipe", "seconds", measured} <= files.read_manifest()[name].keys()
