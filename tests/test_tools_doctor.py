"""`make doctor`: what it finds on this machine, and what it says about machines with faults."""

import getpass
import json
from pathlib import Path

import pytest

from course_utils import backends, cpu
from course_utils.backends import Engine
from course_utils.tools import doctor


@pytest.fixture(scope="module")
def findings():
    return doctor.examine()


def named(findings, what):
    return [finding for finding in findings if finding.what == what]


def test_every_subject_is_covered(findings):
    subjects = {finding.what for finding in findings}
    expected = {
        "Python",
        "torch",
        "torchvision",
        "torchao",
        "packages",
        "CPU",
        "INT8 engines",
        "memory",
        "C++ compiler",
    }
    assert expected | set(doctor.ENGINES) | {"data"} <= subjects
    assert {finding.status for finding in findings} <= {"OK", "WARN", "FAIL"}


def test_this_environment_is_fit(findings):
    for what in ("Python", "torch", "torchvision", "packages", "INT8 engines"):
        assert [finding.status for finding in named(findings, what)] == ["OK"]


def test_report_names_no_path_and_no_user(findings):
    report = "\n".join(map(str, findings))
    assert str(Path.home()) not in report
    assert str(doctor.PYPROJECT.parent) not in report
    assert getpass.getuser() not in report.split()


def test_whatever_is_wrong_comes_with_a_remedy(findings):
    assert all(finding.fix for finding in findings if finding.status == "FAIL" and finding.what != "data")


def test_mismatch():
    for version, requirement, fits in (
        ("2.14.1", "torch>=2.14.0", True),
        ("2.14.1+cpu", "torch==2.14.1", True),
        ("2.14.1+cu130", "torch (==2.14.1)", True),
        ("2.13.0+cpu", "torch==2.14.1", False),
        ("2.13.0", "torch>=2.14.0", False),
        ("2.13.0", "torch>=2.14.0 ; extra == 'other'", True),
        ("2.13.0", "numpy>=99", True),
    ):
        problem = doctor.mismatch("torchvision", "torch", version, requirements=[requirement])
        assert (problem is None) == fits, (version, requirement)
        assert fits or version in problem


def test_another_python_fails(monkeypatch):
    for version, status in (("3.11.0", "OK"), ("3.10.9", "FAIL")):
        monkeypatch.setattr(doctor.platform, "python_version", lambda version=version: version)
        (found,) = doctor.python()
        assert (found.status, found.what) == (status, "Python") and version in found.found
        assert ("PYTHON=python3.11" in found.fix) == (status == "FAIL")


def test_all_subjects_are_asked_in_order(monkeypatch):
    order = "python torch_and_vision torchao packages processor int8_engines memory compiler folders engines data_files".split()
    for found in ("good", "bad"):
        for name in order:
            monkeypatch.setattr(doctor, name, lambda what=f"{name} {found}": iter([what, what]))
        assert doctor.examine() == [f"{name} {found}" for name in order for _ in range(2)]


@pytest.mark.parametrize("name", ["Ada", "Émilie"])
def test_a_record_has_the_findings_and_the_machine_in_a_form_that_json_holds(monkeypatch, name):
    monkeypatch.setattr(cpu, "name", lambda: f"CPU of {name}")
    monkeypatch.setattr(cpu, "flags", lambda: {"avx2", "of no interest"})
    found = [doctor.Finding("WARN", "memory", "little", "close programs"), doctor.Finding("OK", "data", name)]
    kept = doctor.record(found, name)
    assert json.loads(json.dumps(kept)) == kept
    assert [doctor.Finding(**finding) for finding in kept["findings"]] == found
    assert (kept["name"], kept["machine"]["cpu"], kept["machine"]["isa"]) == (name, f"CPU of {name}", ["avx2"])
    assert kept["machine"]["engine"] == backends.default_engine() and kept["doctor"] == doctor.RECORD


def test_torchvision_of_another_torch_fails(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"torch": "2.13.0+cpu", "torchvision": "0.29.1"}.get)
    found = named(doctor.torch_and_vision(), "torchvision")
    assert [finding.status for finding in found] == ["FAIL"]
    assert "found 2.13.0+cpu" in found[0].found
    assert "make setup" in found[0].fix


def test_a_torch_that_does_not_load_fails_alone(monkeypatch):
    monkeypatch.setattr(doctor, "_import_error", lambda name: f"{name} does not load")
    (found,) = doctor.torch_and_vision()
    assert (found.status, found.what) == ("FAIL", "torch")
    assert "torch does not load" in found.found and "make setup" in found.fix


def test_missing_torch_fails(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert list(doctor.torch_and_vision()) == []
    assert [finding.status for finding in named(doctor.packages(), "torch")] == ["FAIL"]
    assert [finding.status for finding in doctor.torchao()] == ["OK"]


def test_package_out_of_range_fails(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "0.0.1" if name == "matplotlib" else None)
    found = list(doctor.packages())
    assert {finding.status for finding in found} == {"FAIL"}
    assert named(found, "matplotlib")[0].found.startswith("0.0.1, wanted ")
    assert named(found, "tqdm")[0].found.startswith("not installed, wanted ")


def test_broken_torchao_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1")
    monkeypatch.setattr(doctor, "_import_error", lambda name: "does not load")
    assert [finding.status for finding in doctor.torchao()] == ["WARN"]


def test_engines_that_do_not_run_are_named_with_the_reason(monkeypatch):
    found = [Engine("onednn", True, "part of this torch"), Engine("pt2e", False, f"no torchao in {Path.home()}/lib")]
    monkeypatch.setattr(backends, "engines", lambda: found)
    monkeypatch.setattr(backends, "default_engine", lambda: "onednn")
    running, absent = doctor.int8_engines()
    assert (running.status, running.found) == ("OK", "onednn; by default: onednn")
    assert (absent.status, absent.what) == ("OK", "engine pt2e")
    assert "does not run (optional): no torchao in" in absent.found and str(Path.home()) not in absent.found


def test_a_torch_without_any_engine_fails(monkeypatch):
    monkeypatch.setattr(backends, "_family_engines", lambda family: [])
    assert [finding.status for finding in doctor.int8_engines()] == ["FAIL"]


def test_what_is_optional_and_missing_is_no_fault_and_has_its_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = [*doctor.engines(), *doctor.compiler()]
    assert [finding.what for finding in found] == [*doctor.ENGINES, "C++ compiler"]
    for finding in found:
        assert (
            finding.status == "OK"
            and "optional" in finding.found
            and ("install" in finding.fix or "make" in finding.fix)
        )


def test_a_checkout_and_a_home_that_take_no_files_are_warnings(monkeypatch):
    monkeypatch.setattr(doctor.files, "is_writable", lambda folder: False)
    assert [(finding.status, finding.what) for finding in doctor.folders()] == [("WARN", "checkout"), ("WARN", "home")]
    monkeypatch.setattr(doctor.files, "is_writable", lambda folder: True)
    assert [finding.status for finding in doctor.folders()] == ["OK", "OK"]


def test_little_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(cpu, "memory_gib", lambda: 1.0)
    assert [finding.status for finding in doctor.memory()] == ["WARN"]


@pytest.mark.parametrize(
    ("flags", "family", "status"),
    [
        ({"avx2"}, "VNNI", "WARN"),
        (set(), "AVX2", "WARN"),
        ({"avx2", "avx_vnni"}, "VNNI", "OK"),
        ({"avx2"}, "AMX", "OK"),
    ],
)
def test_instruction_sets_of_x86(monkeypatch, flags, family, status):
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "flags", lambda: flags)
    assert [finding.status for finding in named(doctor.processor(), family)] == [status]


def test_instruction_sets_of_arm(monkeypatch):
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(cpu, "flags", lambda: {"asimd", "asimddp"})
    found = named(doctor.processor(), "NEON")
    assert found[0].status == "OK" and "asimddp" in found[0].found


def test_altered_data_file_fails_with_its_remedy(monkeypatch, tmp_path):
    (tmp_path / "manifest.json").write_text(
        json.dumps({"a.gz": {"bytes": 3, "sha256": "0" * 64}, "b.gz": {"bytes": 1, "sha256": ""}})
    )
    (tmp_path / "a.gz").write_bytes(b"abc")
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    altered, missing = doctor.data_files()
    assert (altered.status, missing.status) == ("FAIL", "FAIL")
    assert "data/a.gz was altered" in altered.found and "git checkout" in altered.found
    assert "data/b.gz is missing" in missing.found
    assert str(tmp_path) not in f"{altered}{missing}"


def test_exit_code_tells_whether_anything_failed(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("WARN", "memory", "little")])
    assert doctor.main() == 0
    monkeypatch.setattr(
        doctor, "examine", lambda: [doctor.Finding("FAIL", "torch", "not installed", "run `make setup`")]
    )
    assert doctor.main() == 1
    assert "FAIL  torch               not installed  → run `make setup`" in capsys.readouterr().out
