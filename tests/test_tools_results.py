"""The README's results, the page on the engines and the picture come from what was measured, and only from there."""

import matplotlib.testing.compare
import pytest
from PIL import Image

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
    ptq = next(line for line in lines if line.startswith("| PTQ INT8"))
    accuracy = Proportion(937, 1000)
    assert f"93.70 % [{100 * accuracy.low:.2f}, {100 * accuracy.high:.2f}]" in ptq


def test_the_section_is_replaced_and_the_rest_of_the_readme_stays(path, readme):
    results.write_readme(readme, path)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n") and text.endswith("\n\nafter\n")
    assert "old results" not in text and "44.78 MB" in text


def test_writing_twice_changes_nothing(path, readme):
    results.write_readme(readme, path)
    first = readme.stat().st_mtime_ns, readme.read_bytes()
    assert b"old results" not in first[1]
    results.write_readme(readme, path)
    assert (readme.stat().st_mtime_ns, readme.read_bytes()) == first


def test_a_readme_without_the_marks_is_refused_and_left_alone(path, readme):
    readme.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lost the marks"):
        results.write_readme(readme, path)
    assert readme.read_text(encoding="utf-8") == "# Title\n"


CITED = {
    "FP32": {results.SIZE: (44.7e6, "bytes"), results.LATENCY: (12.3, "ms")},
    "PTQ INT8": {results.SIZE: (11.2e6, "bytes"), results.LATENCY: (6.8, "ms")},
    "QAT INT8": {results.LATENCY: (6.4, "ms")},
}
TITLES = ("smaller", "PTQ code", "PTQ makes", "QAT makes", "time.time()", "QAT code", "random labels")


def entry(value, unit="×", source="measured", **interval):
    return {"value": value, "unit": unit, "source": source} | interval


def judged(**measured):
    """Return title → `Claim` of a ledger with the blog's figures and what was `measured`: subject → quantity → entry."""
    records = {m: {q: entry(*each, source="cited") for q, each in said.items()} for m, said in CITED.items()}
    for subject, quantities in measured.items():
        records.setdefault(subject, {}).update(quantities)
    found = list(results.claims(records))
    assert len(found) == len(TITLES)
    return {title: next(claim for claim in found if title in claim.says) for title in TITLES}


def test_every_claim_names_its_figures_and_what_was_not_measured_has_no_verdict():
    found = judged()
    assert {(claim.found, claim.verdict) for claim in found.values()} == {("–", "–")}
    assert "44.7 → 11.2 MB, 3.99×" in found["smaller"].says and "12.3 → 6.8 ms, 1.81×" in found["PTQ makes"].says
    assert "12.3 → 6.4 ms, 1.92×" in found["QAT makes"].says and "6.8 → 6.4 ms, 1.06×" in found["time.time()"].says
    assert {title: claim.notebook for title, claim in found.items()} == {
        **{"smaller": "02", "PTQ code": "02", "PTQ makes": "04", "QAT makes": "04"},
        **{"time.time()": "04", "QAT code": "03", "random labels": "03"},
    }
    assert all(claim.verdict == "–" for claim in results.claims({})), "nothing is judged without the blog's figures"


@pytest.mark.parametrize(
    ("bytes", "verdict"),
    [
        (11_253_608, results.KEPT),
        (11_249_000, results.KEPT),
        (11_400_000, results.MISSED),
        (10_000_000, results.BEATEN),
    ],
)
def test_a_size_is_judged_as_exactly_as_the_blog_prints_it(bytes, verdict):
    found = judged(**{"FP32": {"size": entry(44_775_880, "bytes")}, "PTQ INT8": {"size": entry(bytes, "bytes")}})
    assert found["smaller"].verdict == verdict
    assert f"44.78 MB → {bytes / 1e6:.2f} MB, {44_775_880 / bytes:.2f}×" in found["smaller"].found


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (2.55, 2.66, results.BEATEN),
        (1.84, 2.1, results.BEATEN),
        (1.80, 2.1, results.KEPT),
        (1.5, 1.9, results.KEPT),
        (1.2, 1.5, results.MISSED),
    ],
)
def test_a_speed_up_is_beaten_only_beyond_its_interval(low, high, verdict):
    found = judged(**{"PTQ INT8": {"speed-up over FP32": entry(2.0, low=low, high=high)}})
    assert found["PTQ makes"].verdict == verdict and "2.00×" in found["PTQ makes"].found
    assert found["QAT makes"].verdict == "–"


@pytest.mark.parametrize(
    ("title", "subject", "false", "kept"),
    [
        ("PTQ code", "the blog's PTQ code", {"size": entry(45.3e6, "bytes")}, {"size": entry(11.2e6, "bytes")}),
        (
            *("time.time()", "the blog's stopwatch"),
            *({"one model against itself": entry(ratio)} for ratio in (1.4, 1.01)),
        ),
        (
            *("QAT code", "the blog's QAT code"),
            *({"errors that stop it": entry(number, "errors")} for number in (3, 0)),
        ),
        (
            *("random labels", "the blog's random labels"),
            {
                "accuracy before": entry(0.94, "%", low=0.92, high=0.96),
                "accuracy after ten steps": entry(0.3, "%", low=0.2, high=0.4),
            },
            {
                "accuracy before": entry(0.94, "%", low=0.92, high=0.96),
                "accuracy after ten steps": entry(0.91, "%", low=0.89, high=0.93),
            },
        ),
    ],
)
def test_what_is_printed_is_false_only_when_it_was_seen_to_be(title, subject, false, kept):
    for measured, verdict in ((false, results.FALSE), (kept, results.KEPT)):
        found = judged(**{subject: measured})
        assert found[title].verdict == verdict and found[title].found != "–"
        assert all(claim.verdict == "–" for other, claim in found.items() if other != title)


def test_each_claim_leads_to_the_notebook_that_shows_it():
    rows = [
        line for line in results.results(results.ROOT / "data" / "ledger.json").splitlines() if "](notebooks/" in line
    ]
    assert len(rows) == len(TITLES)
    for row in rows:
        assert (results.ROOT / row.partition("](")[2].rpartition(")")[0]).is_file()


def test_the_committed_page_shows_the_committed_report():
    text = (results.ROOT / results.ENGINES).read_text(encoding="utf-8")
    assert results.engines() in text, "run `make results` and commit the result"
    assert text.count("| INT8") >= 5


def test_the_committed_picture_shows_the_committed_ladder(tmp_path):
    committed, drawn = results.ROOT / results.PICTURE, tmp_path / "ladder.png"
    found, fp32 = results.lines()
    assert set(found["per channel"]) == set(range(2, 9)) and 2 in found["AdaRound, per channel"]
    with Image.open(committed) as picture:
        assert picture.text == {"Source": results.fingerprint(found, fp32)}, "run `make results` and commit the result"
    results.write_picture(drawn)
    with Image.open(drawn) as picture:
        assert picture.text == {"Source": results.fingerprint(found, fp32)}
    assert matplotlib.testing.compare.compare_images(committed, drawn, tol=6) is None


def test_another_accuracy_is_another_picture():
    found, fp32 = results.lines()
    before = results.fingerprint(found, fp32)
    p = found["per channel"][4]
    found["per channel"][4] = Proportion(p.successes - 1, p.n)
    assert results.fingerprint(found, fp32) != before


def test_the_committed_readme_shows_the_committed_ledger():
    text = (results.ROOT / "README.md").read_text(encoding="utf-8")
    assert results.results(results.ROOT / "data" / "ledger.json") in text, "run `make results` and commit the result"
