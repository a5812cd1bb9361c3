"""Levels of the instruction set, and that a process started with one works with no more."""

import pytest
import torch
from safetensors.torch import save_file

from course_utils import backends, isa
from course_utils.profiling import onednn


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ({"avx2"}, ["AVX2", "DEFAULT"]),
        ({"avx2", "avx_vnni"}, ["AVX2", "AVX2_VNNI", "DEFAULT"]),
        ({"avx2", "avx512bw", "avx512_vnni"}, ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "DEFAULT"]),
        ({"asimd"}, ["DEFAULT"]),
    ],
)
def test_levels_are_those_that_the_processor_has(flags, levels, monkeypatch):
    monkeypatch.setattr(isa.cpu, "flags", lambda: flags)
    assert isa.levels() == levels


def test_onednn_works_with_no_more_than_the_level_allows(tmp_path, resnet18, calibration, images):
    if "AVX512_CORE_VNNI" not in isa.levels() or "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("there is no AVX-512 VNNI here to take away")
    int8 = backends.quantize_static(resnet18, calibration, engine="onednn")
    assert all(used.endswith("avx512_core_vnni") for used in onednn(lambda: int8(images)).implementations())
    save_file(resnet18.state_dict(), tmp_path / "fp32")
    backends.save(int8, tmp_path / "int8")
    found = isa.at_level("AVX2", tmp_path / "int8", tmp_path / "fp32", size=32, rounds=3, warmup=1)
    assert (found.level, found.isa) == ("AVX2", "Intel AVX2")
    assert found.convolutions and all(used.endswith("avx2") for used in found.convolutions)
    assert len(found.int8.times) == len(found.fp32.times) == 3 and found.fp32.speedup == 1
    free = isa.at_level("DEFAULT", tmp_path / "int8", tmp_path / "fp32", size=32, rounds=3, warmup=1)
    assert free.level == "DEFAULT" and not any(used.endswith("avx2") for used in free.convolutions)
