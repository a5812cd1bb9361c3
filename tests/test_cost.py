"""Multiplications and numbers moved, against counts by hand, published ones, and torch's own counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from course_utils import models
from course_utils.cost import LayerCost, cost


def test_resnet18_has_the_published_multiplications_and_weights():
    found = cost(models.build("resnet18", num_classes=1000), (3, 224, 224))
    assert sum(layer.macs for layer in found) == 1_814_073_344  # the "1.814 GMAC" of the literature
    # All 11,689,512 parameters but the biases (1,000) and batch norms (9,600).
    assert sum(layer.weights for layer in found) == 11_689_512 - 1_000 - 9_600
    assert len(found) == 21 and (found[0].name, found[-1].name) == ("conv1", "fc")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchs_counter_agrees(name, request):
    model = request.getfixturevalue(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 64, 64))
    assert 2 * sum(layer.macs for layer in cost(model, (3, 64, 64), batch=2)) == counter.get_total_flops()


def test_layers_are_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 5, 10))
    assert cost(model, (4, 5, 5)) == [
        LayerCost("0", macs=8 * 25 * 2 * 9, weights=8 * 2 * 9, inputs=100, outputs=200),
        LayerCost("3", macs=2000, weights=2000, inputs=200, outputs=10),
    ]
    first = cost(model, (4, 5, 5), batch=7)[0]
    assert (first.macs, first.weights, first.inputs, first.outputs) == (7 * 3600, 144, 700, 1400)


def test_a_layer_that_is_called_twice_costs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x))

    assert cost(Twice(), (3,)) == [LayerCost("layer", macs=18, weights=18, inputs=6, outputs=6)]


def test_the_network_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    mean = model[1].running_mean.clone()
    cost(model, (3, 4, 4))
    assert model.training and not model[0]._forward_hooks and torch.equal(model[1].running_mean, mean)
    with pytest.raises(RuntimeError):
        cost(model, (5, 4, 4))
    assert model.training and not model[0]._forward_hooks
    model[1].eval()  # a frozen batch norm
    cost(model, (3, 4, 4))
    assert [module.training for module in model.modules()] == [True, True, False]


def test_bytes_follow_the_widths():
    layer = LayerCost("a", macs=1, weights=100, inputs=30, outputs=20)
    assert layer.bytes() == 600 and layer.bytes(8) == 150 and layer.bytes(4, 32) == 50 + 200
