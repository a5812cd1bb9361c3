"""The guards over the committed notebooks; what their cells print is compared by `make test-notebooks`."""

import pytest

from tests import guards
from tests.toys import ROOT

NOTEBOOKS = ROOT / "notebooks"
EXPECTED = (
    "00_start_here",
    "01_precision_basics",
    "02_post_training_quantization",
    "03_quantization_aware_training",
    "04_benchmarking",
    "05_int4_experiments",
    "06_deployment",
)


def test_every_notebook_is_there_and_no_other():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == list(EXPECTED)


@pytest.mark.parametrize("guard", guards.GUARDS, ids=lambda guard: guard.__name__)
@pytest.mark.parametrize("name", EXPECTED)
def test_guard(name, guard):
    path = NOTEBOOKS / f"{name}.ipynb"
    assert list(guard(guards.read(path), path)) == []
