import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from course_utils import data, files, int4, models, simulate, weights
from course_utils.simulate import Policy
from course_utils.tools import lowbit

RECIPE = lowbit.Recipe(steps=3, batch_size=4, bf16=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder of its own with the course's data and float network in it."""
    for path in files.data_dir().rglob("*"):
        target = tmp_path / path.relative_to(files.data_dir())
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.suffix in (".gz", ".json") or path.name in ("resnet18.safetensors", "mobilenet_v2.safetensors"):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target) if path.suffix != ".json" else target.write_bytes(path.read_bytes())
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    data._splits.cache_clear()
    yield tmp_path
    data._splits.cache_clear()


def test_training_ends_in_a_packed_file_with_its_story(folder, monkeypatch):
    quantized, seconds = lowbit.train(RECIPE, progress=False)
    monkeypatch.setattr(lowbit.data, "batches", lambda images, size: [next(iter(_some(images)))])
    comparison = lowbit.publish(quantized, RECIPE, seconds)
    entry = json.loads((folder / "manifest.json").read_text())[lowbit.TARGET]
    assert entry["recipe"]["steps"] == 3 and entry["accuracy"]["n"] == comparison.n and entry["seconds"] >= 0
    stored = int4.load_packed(files.verified(lowbit.TARGET))
    bits = {name: len(layer.weight.unique()) for name, layer in weights.layers(stored).items()}
    names = list(bits)
    assert all(len(weights.layers(stored)[n].weight[0].unique()) <= 4 for n in names[1:-1])
    assert len(weights.layers(stored)[names[0]].weight[0].unique()) > 4
    size = (folder / lowbit.TARGET).stat().st_size
    n = sum(layer.weight.numel() for layer in weights.layers(stored).values())
    assert size < 1.05 * n * 2 / 8
    rounded = simulate.quantize(models.load("resnet18"), Policy(weights=8))
    again = lowbit.publish(rounded, RECIPE, 7.4)
    entry = json.loads((folder / "manifest.json").read_text())[lowbit.TARGET]
    assert again.second.successes > comparison.second.successes and entry["accuracy"]["test"] == again.second.value
    assert entry["seconds"] == 7


def _some(images):
    x = data.preprocess(images.pixels[:20], images.size)
    yield x, images.labels[:20]


def test_a_killed_training_goes_on(folder, monkeypatch):
    expected, _ = lowbit.train(RECIPE, progress=False)
    finetune = lowbit.training.finetune

    def killed(model, images, *, on_step, **settings):
        def kill(step, m):
            if step == 1:
                raise KeyboardInterrupt

        return finetune(model, images, on_step=kill, save_every=1, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lowbit.training, "finetune", killed)
        lowbit.train(RECIPE, progress=False)
    found, _ = lowbit.train(RECIPE, progress=False)
    for ours, theirs in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_gpu_that_is_not_there_is_said_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["lowbit", "--device", "cuda"])
    with pytest.raises(SystemExit):
        lowbit.main()
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("device", "has_bf16", "bf16"), [("cpu", True, True), ("cpu", False, False), ("cuda", False, True)]
)
def test_the_command_lets_one_process_publish(monkeypatch, capsys, rank, device, has_bf16, bf16):
    @contextlib.contextmanager
    def process_group(asked):
        assert asked == device
        yield rank, f"{device}:{rank}"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lowbit.cpu, "has_bf16", lambda: has_bf16)
    monkeypatch.setattr(lowbit, "process_group", process_group)
    trained = []
    monkeypatch.setattr(lowbit, "train", lambda recipe, **settings: trained.append(settings) or (recipe, 9.0))
    monkeypatch.setattr(lowbit, "publish", lambda model, recipe, seconds: f"{model.bf16} {recipe.bf16} {seconds}")
    monkeypatch.setattr("sys.argv", ["lowbit", "--device", device])
    lowbit.main()
    assert trained == [{"device": f"{device}:{rank}", "progress": rank == 0}]
    said = capsys.readouterr().out
    assert (
        said.startswith(f"{bf16} {bf16} 9.0\n") and f" min → data/{lowbit.TARGET}\n" in said
        if rank == 0
        else said == ""
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_torchrun_a_process_is_the_first_and_only_one(monkeypatch, device):
    monkeypatch.delenv("RANK", raising=False)
    with lowbit.process_group(device) as mine:
        assert mine == (0, device)


def test_the_stored_network_is_the_one_the_manifest_tells_of():
    entry = files.read_manifest()[lowbit.TARGET]
    assert entry["policy"] == str(lowbit.POLICY) and entry["accuracy"]["n"] == 10_000
    model = int4.load_packed(files.verified(lowbit.TARGET))
    assert isinstance(model, nn.Module) and models.architecture(model)["name"] == lowbit.MODEL


def test_it_starts_under_torchrun(tmp_path):
    """Two processes join, and find out that they are two."""
    script = tmp_path / "join.py"
    script.write_text(
        "from course_utils.tools.lowbit import process_group\n"
        "from torch import distributed\n"
        "with process_group('cpu') as (rank, device):\n"
        "    print(f'{rank} of {distributed.get_world_size()} on {device}', flush=True)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert "0 of 2 on cpu" in run.stdout and "1 of 2 on cpu" in run.stdout, run.stderr[-2000:]
