import json
import threading
import time

import filelock
import pytest

from course_utils import files, ledger, measure
from course_utils.stats import Proportion


@pytest.fixture(autouse=True)
def reference(tmp_path, monkeypatch):
    """The ledger that the repository would bring along; it holds one number."""
    path = tmp_path / "reference.json"
    entry = {"value": 9.0, "unit": "ms", "source": "measured", "machine": "abc"}
    content = {"version": 1, "machines": {"abc": {"cpu": "theirs"}}, "records": {"FP32": {"latency": entry}}}
    path.write_text(json.dumps(content))
    monkeypatch.setenv("COURSE_LEDGER_BASE", str(path))
    return path


def own(tmp_path):
    return json.loads((tmp_path / "ledger.json").read_text())


def test_what_was_recorded_can_be_read_again(tmp_path):
    assert ledger.record("INT8", "latency", 3.25, unit="ms", low=3.0, high=3.5, n=40) == 3.25
    entry = ledger.get("INT8", "latency")
    facts = {"value": 3.25, "unit": "ms", "low": 3.0, "high": 3.5, "n": 40, "source": "measured"}
    assert facts.items() <= entry.items()
    machine = own(tmp_path)["machines"][entry["machine"]]
    assert machine == json.loads(json.dumps(measure.machine()))


def test_a_proportion_brings_its_interval_and_count():
    share = Proportion(90, 100)
    assert ledger.record("INT8", "accuracy", share) is share
    entry = ledger.get("INT8", "accuracy")
    assert {"value": 0.9, "low": share.low, "high": share.high, "n": 100, "unit": "%"}.items() <= entry.items()


def test_a_number_recorded_again_replaces_the_old_one_only():
    ledger.record("INT8", "latency", 3.0)
    ledger.record("INT8", "size", 5)
    ledger.record("INT8", "latency", 4.0)
    assert ledger.get("INT8", "latency")["value"] == 4.0 and ledger.get("INT8", "size")["value"] == 5


@pytest.mark.parametrize("source", ["estimated", "cited"])
def test_what_was_not_measured_here_names_no_machine(tmp_path, source):
    ledger.record("blog", "speed-up", 4, unit="×", source=source)
    assert "machine" not in ledger.get("blog", "speed-up") and own(tmp_path)["machines"] == {}


def test_ones_own_number_wins_over_the_reference_and_does_not_change_it(reference):
    before = reference.read_bytes()
    assert ledger.get("FP32", "latency")["value"] == 9.0
    ledger.record("FP32", "latency", 5.0, unit="ms")
    assert ledger.get("FP32", "latency")["value"] == 5.0
    assert reference.read_bytes() == before


def test_what_nobody_recorded_is_none():
    assert ledger.get("FP32", "taste") is None and ledger.get("nobody", "latency") is None
    assert ledger.get("FP32", "latency") is not None


def test_without_environment_numbers_go_to_results_and_come_from_data(tmp_path, monkeypatch):
    monkeypatch.delenv("COURSE_LEDGER")
    monkeypatch.delenv("COURSE_LEDGER_BASE")
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    (tmp_path / files.MANIFEST).write_text("{}")
    ledger.record("INT8", "size", 5)
    assert (tmp_path / "results" / "ledger.json").exists()
    (tmp_path / "results" / "ledger.json").replace(tmp_path / "moved")
    assert ledger.get("INT8", "size") is None
    (tmp_path / "moved").rename(tmp_path / "ledger.json")
    assert ledger.get("INT8", "size")["value"] == 5


@pytest.mark.parametrize("value", ["3", None, True, [1], float("nan"), float("inf")])
def test_only_numbers_are_recorded(tmp_path, value):
    with pytest.raises(ValueError, match="number for size of INT8"):
        ledger.record("INT8", "size", value)
    assert not (tmp_path / "ledger.json").exists()


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ({"low": 0.5}, "low=0.5 and high=None: give both"),
        ({"high": 0.5}, "low=None and high=0.5: give both"),
        ({"low": 0.5, "high": float("inf")}, "two finite numbers"),
        ({"low": float("nan"), "high": 1}, "two finite numbers"),
        ({"low": "0", "high": 1}, "two finite numbers"),
        ({"low": False, "high": True}, "two finite numbers"),
        ({"n": "forty"}, "number for n, of size of INT8, got 'forty'"),
    ],
)
def test_what_would_make_the_ledger_unreadable_is_not_recorded(tmp_path, interval, said):
    with pytest.raises(ValueError, match=said):
        ledger.record("INT8", "size", 1, **interval)
    assert not (tmp_path / "ledger.json").exists()
    assert ledger.get("INT8", "size") is None


def test_an_unknown_source_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'guessed'.*measured, estimated, cited"):
        ledger.record("INT8", "size", 1, source="guessed")


DAMAGED = {
    "cut": b"{",
    "list": b"[]",
    "text": b'"text"',
    "binary": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "old version": b'{"version": 0, "records": {}}',
    "no version": b'{"records": {}}',
    "no records": b'{"version": 1}',
    "no quantities": b'{"version": 1, "machines": {}, "records": {"INT8": []}}',
    "no entry": b'{"version": 1, "machines": {}, "records": {"INT8": {"size": 3}}}',
    "no number": b'{"version": 1, "machines": {}, "records": {"INT8": {"size": {"value": "3", "source": "cited"}}}}',
    "no source": b'{"version": 1, "machines": {}, "records": {"INT8": {"size": {"value": 3}}}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_ledger_that_cannot_be_read_is_one_clear_error(tmp_path, content):
    (tmp_path / "ledger.json").write_bytes(content)
    for use in (lambda: ledger.get("INT8", "size"), lambda: ledger.record("INT8", "size", 1)):
        with pytest.raises(ledger.LedgerError, match="ledger.json.*delete it and run the notebooks again"):
            use()
    assert (tmp_path / "ledger.json").read_bytes() == content


def test_an_empty_file_is_an_empty_ledger(tmp_path):
    (tmp_path / "ledger.json").write_text("")
    assert ledger.get("INT8", "size") is None
    ledger.record("INT8", "size", 1)
    assert ledger.get("INT8", "size")["value"] == 1


def test_an_interrupted_record_keeps_the_old_ledger(tmp_path, monkeypatch):
    ledger.record("INT8", "size", 1)
    before = (tmp_path / "ledger.json").read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.record("INT8", "size", 2)
    assert (tmp_path / "ledger.json").read_bytes() == before and not list(tmp_path.glob(".*partial"))


def record_some(subject):
    for number in range(20):
        ledger.record(subject, f"quantity {number}", number, source="cited")


def test_no_number_is_lost_when_several_record_at_the_same_time(tmp_path, monkeypatch):
    read = ledger.read
    # Time for another to come between.
    monkeypatch.setattr(ledger, "read", lambda path: (read(path), time.sleep(0.002))[0])
    writers = [threading.Thread(target=record_some, args=(f"notebook {i}",)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {subject: len(found) for subject, found in own(tmp_path)["records"].items()} == {
        f"notebook {i}": 20 for i in range(3)
    }


def test_where_there_can_be_no_lock_numbers_are_recorded_all_the_same(tmp_path, monkeypatch):
    (tmp_path / ".ledger.json.lock").mkdir()  # in the way
    ledger.record("INT8", "size", 1)
    (tmp_path / ".ledger.json.lock").rmdir()
    monkeypatch.setattr(ledger, "PATIENCE", 0.1)
    with filelock.FileLock(tmp_path / ".ledger.json.lock"):  # of one that hangs
        other = threading.Thread(target=ledger.record, args=("INT8", "size", 2))
        other.start()
        other.join()
    assert ledger.get("INT8", "size")["value"] == 2


def test_the_folder_of_a_ledger_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_LEDGER", str(tmp_path / "deep" / "er" / "ledger.json"))
    ledger.record("INT8", "size", 1)
    assert ledger.get("INT8", "size")["value"] == 1


def test_the_file_does_not_depend_on_the_order_of_recording(tmp_path):
    numbers = [("B", "y", 1), ("A", "z", 2), ("A", "x", 3)]
    texts = []
    for order in (numbers, numbers[::-1]):
        (tmp_path / "ledger.json").unlink(missing_ok=True)
        for subject, quantity, value in order:
            ledger.record(subject, quantity, value)
        texts.append((tmp_path / "ledger.json").read_text())
    assert texts[0] == texts[1]


def test_merging_adds_and_replaces_and_drops_machines_that_no_number_names(tmp_path, reference):
    ledger.record("FP32", "latency", 5.0, unit="ms")
    ledger.record("INT8", "latency", 2.0, unit="ms")
    ledger.merge(tmp_path / "ledger.json", reference)
    merged = json.loads(reference.read_text())
    assert merged["records"]["FP32"]["latency"]["value"] == 5.0
    assert merged["records"]["INT8"]["latency"]["value"] == 2.0
    assert merged["machines"] == own(tmp_path)["machines"] and "abc" not in merged["machines"]


def test_merging_an_absent_ledger_changes_nothing(tmp_path, reference):
    before = json.loads(reference.read_text())
    ledger.merge(tmp_path / "absent.json", reference)
    assert json.loads(reference.read_text()) == before
    ledger.merge(reference, tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text()) == before


def test_a_table_shows_units_intervals_gaps_and_what_was_not_measured():
    ledger.record("INT8", "size", 11_248_328, unit="bytes")
    ledger.record("INT8", "accuracy", Proportion(81, 263))
    ledger.record("INT8", "speed-up", 2.345, unit="×", low=2.0, high=2.5)
    ledger.record("blog", "speed-up", 4, unit="×", source="cited")
    ledger.record("blog", "latency", 12.3456, unit="ms", source="estimated")
    found = ledger.table(["INT8", "blog", "FP32"], ["size", "accuracy", "speed-up", "latency"])
    assert found.columns == ["", "size", "accuracy", "speed-up", "latency"]
    assert found.rows == [
        ["INT8", "11.25 MB", "30.80 % [25.53, 36.62]", "2.35× [2.00, 2.50]", "–"],
        ["blog", "–", "–", "4.00× (cited)", "12.35 ms (estimated)"],
        ["FP32", "–", "–", "–", "9 ms"],
    ]
    assert ledger.table(["FP32"], ["latency"]).rows == [["FP32", "9 ms"]]


def test_a_claim_prints_what_holds_and_what_was_measured(capsys):
    ledger.claim("INT8 is smaller", 3 > 2, measured="3.98×")
    ledger.claim("INT8 is faster", False)
    ledger.claim("INT8 is faster", False, anywhere=False)
    ledger.claim("INT8 is faster", True, anywhere=False)
    assert capsys.readouterr().out.splitlines() == [
        "✔ INT8 is smaller  (measured: 3.98×)",
        "✘ does not hold here: INT8 is faster",
        "– not on this machine: INT8 is faster",
        "✔ INT8 is faster",
    ]
