import json
import os

import pytest
import torch

from course_utils import files, models, text
from course_utils.tools import train_lm

RECIPE = train_lm.Recipe(steps=5, batch_size=2, warmup=2, bf16=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder of its own with the course's text in it."""
    (tmp_path / "text").mkdir()
    (tmp_path / "checkpoints").mkdir()
    os.link(files.data_dir() / text.FILE, tmp_path / text.FILE)
    (tmp_path / files.MANIFEST).write_bytes((files.data_dir() / files.MANIFEST).read_bytes())
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    monkeypatch.setattr(train_lm.models, "build", build)
    return tmp_path


def build(name):
    """The real network in miniature."""
    from course_utils import char_lm

    model = char_lm.CharLM(context=32, width=16, heads=2, blocks=1)
    model.architecture = {"name": name}
    return model


def test_a_killed_training_goes_on_as_if_nothing_had_happened(folder, monkeypatch):
    monkeypatch.setattr(train_lm, "SAVE_EVERY", 2)
    expected, _ = train_lm.train(RECIPE, progress=False)
    (folder / "checkpoints/char_lm.resume.pt").unlink()
    draw = train_lm._draw

    def killed(tokens, recipe, length, step):
        if step == 3:
            raise KeyboardInterrupt
        return draw(tokens, recipe, length, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_lm, "_draw", killed)
        train_lm.train(RECIPE, progress=False)
    drawn = []
    monkeypatch.setattr(train_lm, "_draw", lambda *a: drawn.append(a[-1]) or draw(*a))
    found, _ = train_lm.train(RECIPE, progress=False)
    assert drawn == [2, 3, 4]
    for ours, theirs in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_it_learns_and_is_published_with_its_story(folder):
    recipe = train_lm.Recipe(steps=60, batch_size=8, warmup=5, max_lr=1e-2, bf16=False)
    model, seconds = train_lm.train(recipe, progress=False)
    short = text.king_james("test")[:3300]
    score = train_lm.publish(model, recipe, seconds, tokens=short)
    assert score.value < 3.2  # of ln 63 = 4.14 where nothing is known
    entry = json.loads((folder / files.MANIFEST).read_text())[models.checkpoint("char_lm")]
    assert entry["recipe"]["steps"] == 60 and entry["loss"]["test"] == score.value and entry["seconds"] >= 0
    assert not list((folder / "checkpoints").glob("*.resume.pt"))
    assert models.load("char_lm").head.weight.shape == (63, 16)
    again = train_lm.publish(model, RECIPE, 7.4, tokens=text.king_james("test")[3300:6600])
    entry = json.loads((folder / files.MANIFEST).read_text())[models.checkpoint("char_lm")]
    assert again.value != score.value and (entry["recipe"]["steps"], entry["seconds"]) == (5, 7)
    assert entry["loss"]["test"] == again.value


@pytest.mark.parametrize("has_bf16", [True, False])
def test_the_command_trains_in_the_precision_that_this_machine_has(monkeypatch, capsys, has_bf16):
    monkeypatch.setattr(train_lm.cpu, "has_bf16", lambda: has_bf16)
    monkeypatch.setattr(train_lm, "train", lambda recipe: (recipe, 90.0))
    monkeypatch.setattr(
        train_lm, "publish", lambda model, recipe, seconds: f"{model == recipe} {recipe.bf16} {seconds}"
    )
    train_lm.main()
    said = capsys.readouterr().out
    assert said == (
        f"char_lm: True {has_bf16} 90.0 nats a character on the test text, 1.5 min → data/{models.checkpoint('char_lm')}\n"
    )


def test_the_rate_rises_and_falls_to_a_tenth():
    rates = [train_lm._rate(step, train_lm.Recipe(steps=100, warmup=10)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01) and rates[10:] == sorted(rates[10:], reverse=True)


def test_sequences_of_a_step_are_the_same_each_time_and_differ_from_the_next():
    tokens = torch.arange(200, dtype=torch.uint8)
    (x, y), again, other = (train_lm._draw(tokens, RECIPE, 32, step) for step in (0, 0, 1))
    assert x.shape == (2, 32) and torch.equal(y, x + 1)
    assert torch.equal(x, again[0]) and not torch.equal(x, other[0])
