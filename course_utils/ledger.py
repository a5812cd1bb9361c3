"""The ledger: what notebooks measured, with unit, interval and machine, for later notebooks and the README to read.

The repository's reference numbers are `data/ledger.json`. Your own runs write to `results/ledger.json`, which is not in git
and wins when both have a number. A full `make run-all` sets COURSE_LEDGER and renews the reference itself.
"""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import filelock

from . import files
from .tables import Table

VERSION = 1
PATIENCE = 10  # seconds to wait for another process that records
SOURCES = ("measured", "estimated", "cited")


class LedgerError(RuntimeError):
    """A ledger file cannot be read; the message says which one and what to do."""


def record(subject, quantity, value, *, unit="", low=None, high=None, n=None, source="measured"):
    """Keep one number: `quantity` of `subject`, for example `record("PTQ INT8", "size", 11_248_328, unit="bytes")`.

    value: a number, or a `Proportion`, which brings its own interval and n. unit: `"%"` for shares, `"×"` for ratios, `"bytes"`,
    `"ms"`, ... low, high: its 95 % interval, both ends or neither. n: how many it is from. source: `"measured"`, `"estimated"` or
    `"cited"`. A number recorded again replaces the old one; several processes may record at the same time. Returns `value`.

    Raises `ValueError` for another source, a value, end or n that is not a finite number, and an interval with one end;
    nothing is written then. `LedgerError` as in `read`.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}: choose one of {', '.join(SOURCES)}")
    returned = value
    if hasattr(value, "successes"):
        low, high, n, unit, value = value.low, value.high, value.n, unit or "%", value.value
    if not _is_number(value):
        raise ValueError(f"expected a finite number for {quantity} of {subject}, got {value!r}")
    if (low, high) != (None, None) and not (_is_number(low) and _is_number(high)):
        raise ValueError(
            f"the interval for {quantity} of {subject} needs two finite numbers, got low={low!r} and high={high!r}: "
            "give both ends, or neither"
        )
    if n is not None and not _is_number(n):
        raise ValueError(f"expected a finite number for n, of {quantity} of {subject}, got {n!r}")
    entry = {"value": value, "unit": unit, "low": low, "high": high, "n": n, "source": source}
    entry = {key: item for key, item in entry.items() if item is not None}
    if source == "measured":
        entry["machine"], facts = _this_machine()
    path = _own_path()
    with _alone(path):
        content = read(path)
        content["records"].setdefault(subject, {})[quantity] = entry
        if source == "measured":
            content["machines"][entry["machine"]] = facts
        _write(path, content)
    return returned


def get(subject, quantity):
    """Return the entry of one number as a dict (value, unit, low, high, n, source, machine), or None if never recorded."""
    for path in (_own_path(), _base_path()):
        entry = read(path)["records"].get(subject, {}).get(quantity)
        if entry is not None:
            return entry
    return None


def table(subjects, quantities):
    """Return a `Table` with one row a subject and one column a quantity; '–' where nothing was recorded."""
    rows = [[s, *[format_entry(get(s, q)) for q in quantities]] for s in subjects]
    return Table(["", *quantities], rows)


def format_entry(entry):
    """Return an entry as text with its unit and interval, '–' for None; estimates and citations say so."""
    if entry is None:
        return "–"
    kind = entry.get("unit", "")
    text = _format(entry["value"], kind)
    if "low" in entry:
        text += f" [{_format(entry['low'], kind, bare=True)}, {_format(entry['high'], kind, bare=True)}]"
    return text if entry["source"] == "measured" else f"{text} ({entry['source']})"


def claim(text, holds, *, measured=None, anywhere=True):
    """Print whether a statement of the lesson holds in this run, with what was measured.

    ✔ when it does. ✘ when it does not: then believe the measurement, not the lesson. anywhere: whether it must hold on any
    machine; of one that hangs on the processor, or on how quiet the machine is, a – says that it does not hold on this one.
    """
    suffix = "" if measured is None else f"  (measured: {measured})"
    refuted = "✘ does not hold here:" if anywhere else "– not on this machine:"
    print(f"{'✔' if holds else refuted} {text}{suffix}")


def merge(source, target):
    """Add the records of the ledger file `source` to `target`, in one step; same records replace older ones."""
    new, content = read(source), read(target)
    for subject, quantities in new["records"].items():
        content["records"].setdefault(subject, {}).update(quantities)
    content["machines"].update(new["machines"])
    used = {e.get("machine") for quantities in content["records"].values() for e in quantities.values()}
    content["machines"] = {key: facts for key, facts in content["machines"].items() if key in used}
    _write(Path(target), content)


def _own_path():
    own = os.environ.get("COURSE_LEDGER")
    return Path(own) if own else files.results_dir() / "ledger.json"


def _base_path():
    return Path(os.environ.get("COURSE_LEDGER_BASE") or files.data_dir() / "ledger.json")


def read(path):
    """Return a ledger file as a dict (version, machines, records), an empty one if there is no file.

    Raises `LedgerError` for a damaged file or one of another version.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not text.strip():
            return {"version": VERSION, "machines": {}, "records": {}}
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"it has version {content['version']}, expected {VERSION}")
        if not isinstance(content["records"], dict) or not isinstance(content["machines"], dict):
            raise ValueError("its records are not in tables")
        for subject, quantities in content["records"].items():
            for quantity, entry in quantities.items():
                numbers = [entry["value"], *(entry[key] for key in ("low", "high", "n") if key in entry)]
                if entry["source"] not in SOURCES or not all(isinstance(number, int | float) for number in numbers):
                    raise ValueError(f"{quantity} of {subject} is not a number with its source")
                format_entry(entry), hash(entry.get("machine"))  # what a damaged one leads to is raised here
        json.dumps(content, ensure_ascii=False).encode()  # no file can hold half a character
        return content
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LedgerError(
            f"cannot read the ledger {path} ({error}): restore it if it is in git, or delete it and run the notebooks again"
        ) from None


@contextlib.contextmanager
def _alone(path):
    """Keep other processes from recording in the ledger `path` meanwhile: what they add between read and write would be lost."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=PATIENCE)
    # Where there can be no lock, or whoever has it hangs, go on without: the file itself is replaced in one step anyway.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write(path, content):
    content["records"] = {s: dict(sorted(q.items())) for s, q in sorted(content["records"].items())}
    files.write_text(path, json.dumps(content, indent=1, ensure_ascii=False, sort_keys=False) + "\n")


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _this_machine():
    from .measure import machine

    facts = machine()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10], facts


def _format(value, unit, bare=False):
    if unit == "bytes":
        return f"{value / 1e6:.2f}" + ("" if bare else " MB")
    if unit == "%":
        return f"{100 * value:.2f}" + ("" if bare else " %")
    if unit == "×":
        return f"{value:.2f}" + ("" if bare else "×")
    return f"{value:.4g}" + ("" if bare or not unit else f" {unit}")
