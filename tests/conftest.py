"""What the tests share: no test writes into the checkout, and networks whose batch norms are not the identity."""

import gzip
import hashlib
import json

import hypothesis
import pytest
import torch

from course_utils import data, files, models

# The same examples each time: what passes here passes for everybody. `--hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("course", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("course")


@pytest.fixture(autouse=True)
def own_ledger(tmp_path, monkeypatch):
    """Let every test write its measurements and its progress into files of its own."""
    monkeypatch.setenv("COURSE_LEDGER", str(tmp_path / "ledger.json"))
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("COURSE_PROGRESS", str(tmp_path / "progress.json"))


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """See that a test leaves torch's global switches alone: other lessons in the same kernel rely on them."""

    def switches():
        return torch.is_grad_enabled(), torch.backends.quantized.engine, torch.get_num_threads()

    before = switches()
    yield
    after = switches()
    torch.set_grad_enabled(before[0])
    torch.backends.quantized.engine = before[1]
    torch.set_num_threads(before[2])
    assert after == before, f"(gradients on, quantized engine, threads) went from {before} to {after}"


def randomised(name):
    """Return an untrained network in evaluation mode whose batch norms do something."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = models.load(name, weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.1, 0.1),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model


def fingerprint(model):
    """Return a hash of all weights and statistics of `model`."""
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()


@pytest.fixture(scope="session")
def resnet18():
    """ResNet18 with random weights and batch-norm statistics; no test may change it."""
    model = randomised("resnet18")
    before = fingerprint(model)
    yield model
    assert fingerprint(model) == before and not model.training, "a test changed the shared model"


@pytest.fixture(scope="session")
def mobilenet_v2():
    """MobileNetV2 with random weights and batch-norm statistics; no test may change it."""
    model = randomised("mobilenet_v2")
    before = fingerprint(model)
    yield model
    assert fingerprint(model) == before and not model.training, "a test changed the shared model"


@pytest.fixture(scope="session")
def calibration():
    """Two batches of eight real images, small enough to be quick."""
    return list(data.batches(data.fashion_mnist("calibration", size=32), 8, limit=16))


@pytest.fixture(scope="session")
def images(calibration):
    """Eight real images as model input."""
    return calibration[0][0]


@pytest.fixture
def tiny_data(tmp_path, monkeypatch):
    """A data folder in miniature, in the original file format: 12 images a class to train on, 2 a class to test."""
    folder = tmp_path / "data"
    monkeypatch.setenv("COURSE_DATA", str(folder))
    monkeypatch.setattr(data, "PER_CLASS", {"calibration": 2, "validation": 4})
    generator = torch.Generator().manual_seed(0)
    manifest = {}
    for part, n in (("train", 120), ("t10k", 20)):
        pixels = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8, generator=generator)
        labels = (torch.arange(n) % 10).to(torch.uint8)
        for name, tensor in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            sides = b"".join(side.to_bytes(4, "big") for side in tensor.shape)
            unpacked = bytes([0, 0, 8, tensor.ndim]) + sides + tensor.numpy().tobytes()
            path = folder / data.FOLDER / f"{name}.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(unpacked))
            manifest[f"{data.FOLDER}/{name}.gz"] = {
                "bytes": path.stat().st_size,
                "sha256": files.sha256(path),
                "unpacked_sha256": hashlib.sha256(unpacked).hexdigest(),
            }
    (folder / files.MANIFEST).write_text(json.dumps(manifest))
    data._splits.cache_clear()
    yield folder
    data._splits.cache_clear()
