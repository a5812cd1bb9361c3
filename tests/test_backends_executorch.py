"""Engine executorch: what every engine has to keep, and that XNNPACK has all of the network."""

import sys

from course_utils import backends
from tests.engines import Contract


class TestExecuTorch(Contract):
    engine = package = "executorch"
    observers = ("minmax", "histogram")

    def test_xnnpack_runs_the_whole_network(self, int8, fp32):
        from executorch.runtime import Runtime

        for model in (int8, fp32):
            method = Runtime.get().load_program(model.content["pte"]).load_method("forward")
            assert method.metadata.num_inputs() == 1
            assert model.content["pte"].count(b"XnnpackBackend") >= 1 and b"aten::" not in model.content["pte"]

    def test_an_executorch_without_xnnpack_is_a_sentence(self, fp32, monkeypatch):
        family = sys.modules["course_utils.backends.executorch"]

        class Bare:
            backend_registry = type("Registry", (), {"registered_backend_names": ["SomethingElse"]})

        monkeypatch.setattr(family.Runtime, "get", lambda: Bare)
        (found,) = backends.engines("executorch")
        assert not found.runs and "without XNNPACK" in found.why
