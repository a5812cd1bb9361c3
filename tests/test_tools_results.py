"""The README's results come from the ledger, and only from there."""

import pytest

from course_utils import ledger
from course_utils.stats import Proportion
from course_utils.tools import results


@pytest.fixture
def path(tmp_path, monkeypatch):
    path = tmp_path / "some-ledger.json"
    monkeypatch.setenv("COURSE_LEDGER", str(path))
    ledger.record("FP32", "size", 44_775_880, unit="bytes")
    ledger.record("PTQ INT8", "accuracy", Proportion(937, 1000))
    ledger.record("PTQ INT8", "latency, as the blog claims", 6.8, unit="ms", source="cited")
    return path


@pytest.fixture
def readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{results.BEGIN}\nold results\n{results.END}\n\nafter\n", encoding="utf-8")
    return readme


def test_results_hold_what_was_measured_and_a_dash_for_what_was_not(path):
    lines = results.results(path).splitlines()
    fp32 = next(line for line in lines if line.startswith("| FP32"))
    assert "44.78 MB" in fp32 and "–" in fp32
    ptq = next(line for line in lines if line.startswith("| PTQ"))
    accuracy = Proportion(937, 1000)
    assert f"93.70 % [{100 * accuracy.low:.2f}, {100 * accuracy.high:.2f}]" in ptq and "6.8 ms" in ptq


def test_the_section_is_replaced_and_the_rest_of_the_readme_stays(path, readme):
    results.write_readme(readme, path)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n") and text.endswith("\n\nafter\n")
    assert "old results" not in text and "44.78 MB" in text


def test_writing_twice_changes_nothing(path, readme):
    results.write_readme(readme, path)
    first = readme.stat().st_mtime_ns, readme.read_bytes()
    results.write_readme(readme, path)
    assert (readme.stat().st_mtime_ns, readme.read_bytes()) == first


def test_a_readme_without_the_marks_is_refused_and_left_alone(path, readme):
    readme.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lost the marks"):
        results.write_readme(readme, path)
    assert readme.read_text(encoding="utf-8") == "# Title\n"


def test_the_committed_readme_shows_the_committed_ledger():
    text = (results.ROOT / "README.md").read_text(encoding="utf-8")
    assert results.results(results.ROOT / "data" / "ledger.json") in text, "run `make results` and commit the result"
