"""One list of versions: pyproject.toml, the locks, requirements-torch.txt and environment.yml do not drift apart."""

import re
import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.toys import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK, ENGINES_LOCK, TORCH = "requirements.lock", "requirements-engines.lock", "requirements-torch.txt"
VERBS = "setup run-all test lab doctor train results report compare clean help lint lock".split()


def pins(name):
    """Return the pinned requirements of a file: canonical name → list of `Requirement` (one for each platform)."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            requirement = Requirement(line.removesuffix("\\").strip())
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def version(requirement):
    (pin,) = requirement.specifier
    assert pin.operator == "==", f"{requirement} is not pinned"
    return pin.version


@pytest.mark.parametrize(
    ("lines", "lock"),
    [(PROJECT["dependencies"] + EXTRAS["test"], LOCK), (PROJECT["dependencies"] + EXTRAS["engines"], ENGINES_LOCK)],
    ids=["course and tests", "engines"],
)
def test_every_dependency_is_pinned_within_its_range(lines, lock):
    pinned = pins(lock) | pins(TORCH)
    for wanted in map(Requirement, lines):
        assert canonicalize_name(wanted.name) in pinned, f"{wanted.name} is missing: run `make lock`"
        for pin in pinned[canonicalize_name(wanted.name)]:
            assert version(pin) in wanted.specifier, f"{pin} is outside {wanted}: run `make lock`"


def test_one_extra_holds_all_engines_that_run_on_a_cpu():
    single = {line for name in ("onnxruntime", "openvino", "executorch", "gguf") for line in EXTRAS[name]}
    assert set(EXTRAS["engines"]) == single | {line for line in EXTRAS["test"] if line.startswith("torchao")}


def test_torch_is_in_its_own_file_alone():
    assert set(pins(TORCH)) == {"torch", "torchvision"}
    assert not set(pins(TORCH)) & (set(pins(LOCK)) | set(pins(ENGINES_LOCK)))


def test_both_locks_agree():
    engines = pins(ENGINES_LOCK)
    for name, requirements in pins(LOCK).items():
        assert {str(r) for r in requirements} == {str(r) for r in engines[name]}, "run `make lock`"


@pytest.mark.parametrize("lock", [LOCK, ENGINES_LOCK, "requirements-gguf.txt"])
def test_every_pin_has_hashes(lock):
    entries = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / lock).read_text())[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)


@pytest.mark.parametrize(
    "name",
    [LOCK, ENGINES_LOCK, TORCH, "requirements-gguf.txt", "pyproject.toml", "environment.yml", "Makefile", "postBuild"],
)
def test_no_addresses(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"\w+://|--(extra-)?index|--find-links|\s@\s+\w", text)


def test_conda_and_binder_install_the_same_files():
    environment = (ROOT / "environment.yml").read_text()
    assert re.search(rf"^ +- -r {LOCK}$", environment, re.M)
    (python,) = re.findall(r"^  - python=(\S+)$", environment, re.M)
    assert python in SpecifierSet(PROJECT["requires-python"])
    assert f"-r {TORCH}" in (ROOT / "postBuild").read_text() and f"-r {TORCH}" in environment


def make(*arguments, cwd=ROOT):
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.fixture
def bare(tmp_path):
    """A checkout without environment, in a path with a space; its locks are empty, so nothing is downloaded."""
    folder = tmp_path / "my course"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    for name in (LOCK, ENGINES_LOCK, TORCH, "requirements-gguf.txt", "pyproject.toml"):
        (folder / name).touch()
    return folder


def test_help_lists_every_verb_on_one_line():
    lines = make().stdout.splitlines()
    verbs = [line.split()[1] for line in lines]
    assert set(VERBS) <= set(verbs)
    assert len(verbs) == len(set(verbs))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("PYTHON=false", "false is not a Python 3.11, 3.12 or 3.13."),
        ("PYTHON=", "No Python 3.11, 3.12 or 3.13 found"),
        ("TORCH=gpu", "TORCH=gpu is unknown"),
    ],
)
def test_setup_says_what_is_wrong_and_leaves_no_stamp(bare, option, message):
    result = make("setup", option, cwd=bare)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (bare / ".venv" / ".installed").exists()


def test_failed_install_leaves_no_stamp(bare):
    (bare / LOCK).write_text("no requirement at all\n")
    result = make("setup", cwd=bare)
    assert result.returncode != 0
    assert (bare / ".venv" / "bin" / "python").exists()
    assert not (bare / ".venv" / ".installed").exists()
