import json
import platform

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from course_utils import backends, child, energy, isa, measure, profiling, qat, timing
from course_utils.stats import Proportion, mcnemar, paired_difference


class Says(nn.Module):
    """A model that predicts what it was told, image after image; it notes the mode and gradients it was run under."""

    def __init__(self, *predictions):
        super().__init__()
        self.predictions, self.seen = torch.tensor(predictions), []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return nn.functional.one_hot(self.predictions[x.flatten().long()], 3).float()


def numbered(labels, batch_size=2):
    """Batches whose images are their own index."""
    x, y = torch.arange(len(labels)).float()[:, None], torch.tensor(labels)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def test_accuracy_counts_what_is_right_over_all_batches():
    assert measure.accuracy(Says(0, 1, 2, 0, 0), numbered([0, 1, 1, 0, 2])) == Proportion(3, 5)


def test_accuracy_takes_any_callable():
    assert measure.accuracy(lambda x: torch.eye(3)[x.flatten().long()], numbered([0, 1, 1])) == Proportion(2, 3)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_happens_in_evaluation_mode_without_gradients_and_restores_the_mode(training):
    model = Says(0, 1, 2).train(training)
    measure.accuracy(model, numbered([0, 1, 1]))
    measure.compare(model, model, numbered([0, 1, 1]))
    assert set(model.seen) == {(False, False)} and model.training is training


def small(dropout=0.5):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 3))


MEASURES = {
    "accuracy": measure.accuracy,
    "predictions": measure.predictions,
    "compare": lambda model, batches: measure.compare(model, model, batches),
}


@pytest.mark.parametrize("measured", MEASURES.values(), ids=MEASURES)
def test_a_frozen_batch_norm_stays_frozen(measured):
    model = small().train()
    qat.freeze(model)
    assert measured(model, [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))])
    assert [part.training for part in model] == [True, False, True, True, True] and model.training


@pytest.mark.parametrize("measured", MEASURES.values(), ids=MEASURES)
def test_a_part_in_training_mode_is_evaluated_too_and_goes_back(measured):
    model, modes = small().eval(), []
    model[2].train()
    model[2].register_forward_pre_hook(lambda dropout, args: modes.append(dropout.training))
    assert measured(model, [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))])
    assert modes and not any(modes) and [part.training for part in model] == [False, False, True, False, False]


def test_every_mode_is_restored_when_the_model_or_a_label_fails():
    model = small().train()
    qat.freeze(model)
    for batch in [(torch.randn(2, 2, 8, 8), torch.tensor([0, 1])), (torch.randn(2, 3, 8, 8), torch.tensor([0, 1, 2]))]:
        with pytest.raises(RuntimeError):
            measure.accuracy(model, [batch])
        assert [part.training for part in model] == [True, False, True, True, True] and torch.is_grad_enabled()


def test_exported_networks_in_training_go_back_to_it():
    pytest.importorskip("torchao", reason="torchao is not installed (make setup)")
    prepared = backends.prepare_qat(small(), engine="pt2e", image_shape=(3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert measure.accuracy(prepared, [(x, torch.tensor([0, 1]))]).n == 2
    assert prepared.training and not torch.equal(prepared(x), prepared(x))  # dropout


def test_gradients_are_on_again_after_measuring():
    assert measure.accuracy(Says(0, 1, 2), numbered([0, 1, 1])).successes == 2
    assert torch.is_grad_enabled()
    assert measure.compare(Says(0, 1, 2), Says(0, 1, 1), numbered([0, 1, 1])).fixed == 1
    assert torch.is_grad_enabled()


def test_the_mode_is_restored_when_the_model_fails():
    model = Says(0).train()
    with pytest.raises(IndexError):
        measure.accuracy(model, numbered([0, 1, 1]))
    assert model.training and torch.is_grad_enabled()


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="only once"):
        measure.accuracy(Says(0), [])
    with pytest.raises(ValueError, match="only once"):
        measure.compare(Says(0), Says(0), iter([]))


def test_compare_counts_flips_and_who_is_right():
    #        both  fixed  broke  other wrong class  both wrong alike
    first = Says(0, 1, 1, 1, 2)
    second = Says(0, 0, 0, 2, 2)
    found = measure.compare(first, second, iter(numbered([0, 0, 1, 0, 0])))
    assert (found.n, found.flips, found.fixed, found.broke) == (5, 3, 1, 1)
    assert (found.first, found.second) == (Proportion(2, 5), Proportion(2, 5))
    assert found.agreement == pytest.approx(0.4) and found.difference == 0 and found.p == 1


def test_a_comparison_carries_its_interval_and_p_value():
    found = measure.Comparison(1000, Proportion(930, 1000), Proportion(910, 1000), flips=50, fixed=10, broke=30)
    assert found.low < found.difference < found.high < 0 and found.difference == pytest.approx(-0.02)
    assert found.p == mcnemar(10, 30) and found.agreement == 0.95
    other = measure.Comparison(100, Proportion(50, 100), Proportion(60, 100), flips=10, fixed=10, broke=0)
    assert other.agreement == 0.9 and other.p == mcnemar(10, 0)
    assert (other.difference, other.low, other.high) == paired_difference(10, 0, 100)
    assert str(found).startswith("93.00% → 91.00%: -2.00 points [-3.24, -0.75], 50 of 1,000 predictions changed (")
    assert str(found).endswith("(10 fixed, 30 broke, McNemar p = 0.0022)")


def test_size_on_disk_is_the_size_of_the_file(tmp_path, resnet18):
    path = tmp_path / "model.safetensors"
    save_file(resnet18.state_dict(), path)
    size = path.stat().st_size
    assert measure.size_on_disk(path) == measure.size_on_disk(str(path)) == measure.size_on_disk(resnet18) == size


def test_size_on_disk_of_a_quantized_model_is_that_of_its_saved_file(tmp_path):
    dynamic = backends.quantize_dynamic(nn.Sequential(nn.Linear(64, 64)))
    assert measure.size_on_disk(dynamic) == backends.save(dynamic, tmp_path / "model")
    assert measure.size_on_disk(dynamic) < measure.size_on_disk(nn.Sequential(nn.Linear(64, 64))) / 2


def test_the_machine_is_described_by_facts_that_json_can_hold(monkeypatch):
    facts = measure.machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"] and facts["cores"] >= 1 and facts["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert facts["memory_gib"] is None or facts["memory_gib"] > 0
    monkeypatch.setattr(measure.cpu, "name", lambda: "A Xeon")
    monkeypatch.setattr(measure.cpu, "flags", lambda: {"avx2", "fpu"})
    other = measure.machine()
    assert (other["cpu"], other["isa"]) == ("A Xeon", ["avx2"]) and other.keys() == facts.keys()


def test_stored_predictions_compare_as_the_models_do(resnet18, images):
    batches = [(images[:4], torch.tensor([0, 1, 2, 3])), (images[4:], torch.tensor([4, 5, 6, 7]))]

    def other(x):
        return resnet18(x).roll(1, 1)

    first, labels = measure.predictions(resnet18, batches)
    second, again = measure.predictions(other, batches)
    assert torch.equal(labels, torch.arange(8)) and torch.equal(labels, again)
    assert measure.compare_predictions(first, second, labels) == measure.compare(resnet18, other, batches)
    with pytest.raises(ValueError, match="no images"):
        measure.predictions(resnet18, [])
    with pytest.raises(ValueError, match="8, 7 and 8"):
        measure.compare_predictions(first, second[1:], labels)


def test_seeds_are_compared_image_by_image():
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    right = labels.clone()
    one_off, two_off = labels.clone(), labels.clone()
    one_off[0], two_off[:2] = 9, 9
    found = measure.compare_seeds([two_off, two_off], [one_off, right], labels)
    assert (found.first, found.second, found.difference) == pytest.approx((0.75, 0.9375, 0.1875))
    assert found.each == pytest.approx((0.125, 0.25)) and found.low < 0.1875 < found.high
    assert str(found).startswith("+18.75 [")
    with pytest.raises(ValueError, match="1 and 2 seeds"):
        measure.compare_seeds([right], [right, right], labels)


def test_what_has_a_module_of_its_own_can_be_called_here_too():
    assert measure.latency is timing.latency and measure.peak_memory is child.peak_memory
    assert measure.energy is energy.energy and measure.kernels is profiling.kernels and measure.at_level is isa.at_level
    assert all(hasattr(measure, name) for name in measure.__all__)
