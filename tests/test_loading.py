"""A saved model is loaded, in this process or, to be measured, in one of its own."""

import pytest
import torch
from safetensors.torch import save_file

from course_utils import backends, loading, models


def test_loading_is_timed_in_a_child_with_its_imports_and_without(tmp_path):
    path = tmp_path / "float"
    save_file(models.load("resnet18", weights=None).state_dict(), path)
    found = loading.loading(path, "resnet18", size=32)
    assert found.first > found.again > 0  # the first one imports torchvision
    assert 44 < found.memory.added / 1e6 < found.memory.total / 1e6, "the weights at least"
    with pytest.raises(FileNotFoundError, match="not-here"):
        loading.loading(tmp_path / "not-here", "resnet18")


def test_load_model_takes_float_and_quantized_files(tmp_path, resnet18, images):
    save_file(resnet18.state_dict(), tmp_path / "float")
    int8 = backends.quantize_dynamic(resnet18)
    backends.save(int8, tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(loading.load_model(tmp_path / "float", "resnet18")(images), resnet18(images))
        assert torch.equal(loading.load_model(tmp_path / "int8")(images), int8(images))
