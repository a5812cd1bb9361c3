"""One list of versions: pyproject.toml, the locks, requirements-torch.txt and environment.yml do not drift apart."""

import os
import re
import shutil
import subprocess
import tomllib
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.toys import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
EXTRAS = PROJECT["optional-dependencies"]
LOCK, ENGINES_LOCK, TORCH = "requirements.lock", "requirements-engines.lock", "requirements-torch.txt"
VERBS = (
    "setup run-all test lab audit drift doctor train results report compare site kit class clean help lint lock".split()
)


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
    assert re.search(rf"^ +- --require-hashes\n +- -r {LOCK}$", environment, re.M)
    (python,) = re.findall(r"^  - python=(\S+)$", environment, re.M)
    assert python in SpecifierSet(PROJECT["requires-python"])
    assert f"-r {TORCH}" in environment
    installs = [line for line in (ROOT / "postBuild").read_text().splitlines() if " install " in line]
    assert [line.partition(" install ")[2].split()[-2:] for line in installs] == [["-r", TORCH], ["-e", "."]]
    assert " --no-deps -e" in installs[1], "nothing beside the lock may come in with the course"


@pytest.mark.skipif(os.name != "posix", reason="Binder is a Linux, and this makes a program of a shell script")
def test_on_binder_nobody_is_asked_whether_they_want_news(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != -c ] || echo "{tmp_path}/the prefix"\n')
    python.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    subprocess.run(["bash", "postBuild"], cwd=ROOT, env=environment() | {"PATH": path}, check=True)
    copied = tmp_path / "the prefix" / "share" / "jupyter" / "lab" / "settings" / "overrides.json"
    assert copied.read_bytes() == (ROOT / "course_utils" / "jupyterlab" / "overrides.json").read_bytes()


def test_the_commands_without_make_are_those_of_setup(bare):
    installs = re.compile(r"-m pip install (?:-qq --disable-pip-version-check )?(.+)$", re.M)
    made = installs.findall(make("-n", "setup", cwd=bare).stdout)
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```powershell\n(.*?)```", page, re.S)
    assert installs.findall(block) == made and "-m course_utils lab" in block


def environment():
    """The environment without what a `make` around the tests was told."""
    told = {
        "TORCH",
        "TORCH_INDEX",
        "ENGINES",
        "LATEST",
        "OLDEST",
        "PYTHON",
        "VENV",
        "MAKEFLAGS",
        "MAKELEVEL",
        "MAKEOVERRIDES",
        "MFLAGS",
    }
    return {name: value for name, value in os.environ.items() if name not in told}


def make(*arguments, cwd=ROOT):
    return subprocess.run(["make", *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60)


def course_in(folder):
    """Make a checkout without environment, whose locks are empty so that nothing is downloaded; return its folder.

    With INSTALLED=installed on its command line, make takes what is there for installed.
    """
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    for name in (LOCK, ENGINES_LOCK, TORCH, "requirements-gguf.txt", "pyproject.toml", "installed"):
        (folder / name).touch()
    return folder


@pytest.fixture
def bare(tmp_path):
    """Such a checkout, in a path with a space."""
    return course_in(tmp_path / "my course")


def test_help_lists_every_verb_on_one_line():
    lines = make().stdout.splitlines()
    verbs = [line.split()[1] for line in lines]
    assert set(VERBS) <= set(verbs)
    assert len(verbs) == len(set(verbs))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("PYTHON=false", "false does not run here, or is not a Python 3.11, 3.12 or 3.13."),
        ("PYTHON=", "No Python 3.11, 3.12 or 3.13 found"),
        ("TORCH=gpu", "TORCH=gpu is unknown"),
        ("TORCH=nightly", "environment variable TORCH_INDEX"),
    ],
)
def test_setup_says_what_is_wrong_and_leaves_no_stamp(bare, option, message):
    result = make("setup", option, cwd=bare)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (bare / ".venv" / ".installed").exists()


def test_a_package_without_its_hash_fails_setup_and_leaves_no_stamp(bare):
    with zipfile.ZipFile(bare / "toy-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy.py", "")
        wheel.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        wheel.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("toy-1.0.dist-info/RECORD", "")
    for hashes, message in ((f" --hash=sha256:{0:064x}", "DO NOT MATCH THE HASHES"), ("", "Hashes are required")):
        (bare / LOCK).write_text(f"./toy-1.0-py3-none-any.whl{hashes}\n")
        result = make("setup", cwd=bare)
        assert result.returncode != 0
        assert message in result.stderr
        assert not list(bare.glob(".venv/**/toy.py"))
        assert (bare / ".venv" / "bin" / "python").exists()
        assert not (bare / ".venv" / ".installed").exists()


def test_nightly_torch_comes_last_and_its_address_from_outside(bare):
    lines = make("-n", "setup", "TORCH=nightly", "LATEST=1", "TORCH_INDEX=somewhere", cwd=bare).stdout.splitlines()
    (nightly,) = [number for number, line in enumerate(lines) if "--prerelease allow" in line]
    assert lines[nightly].startswith('UV_INDEX="$TORCH_INDEX" ')
    assert nightly > max(number for number, line in enumerate(lines) if '-e ".[test' in line)


def test_on_windows_the_programs_are_in_another_folder(bare):
    printed = make("-n", "lab", "OS=Windows_NT", "ENGINES=1", cwd=bare).stdout
    assert ".venv/Scripts/python" in printed
    assert "bin/python" not in printed


@pytest.mark.parametrize(
    ("said", "code", "passes", "sentence"),
    [
        ("No known vulnerabilities found", 0, True, ""),
        ("Found 1 known vulnerability in 1 package", 1, False, ""),
        ("error: cannot connect", 2, False, "make audit needs the network"),
    ],
)
def test_audit_passes_only_what_was_looked_up_and_is_clean(bare, said, code, passes, sentence):
    uv = bare / "python"
    uv.write_text(f'#!/bin/sh\necho "$*" >> asked\necho "{said}" >&2\nexit {code}\n')
    uv.chmod(0o755)
    result = make("audit", "PY=./python", "INSTALLED=installed", cwd=bare)
    assert (result.returncode == 0) == passes
    assert said in result.stdout
    assert ("network" in result.stderr) == bool(sentence) and sentence in result.stderr
    asked = (bare / "asked").read_text().splitlines()
    assert all(line.startswith("-m uv tool run --quiet --isolated ") and " --strict " in line for line in asked)
    files = [line.split()[-1] for line in asked]
    assert files == [ENGINES_LOCK, "requirements-gguf.txt", TORCH][: None if not sentence else 1]


def test_drift_judges_the_report_of_the_comparison(bare):
    printed = make("-n", "drift", "TORCH=nightly", "TORCH_INDEX=somewhere", cwd=bare).stdout
    assert printed.count("results/drift/nightly.xml") >= 3  # removed, written, judged
    assert '--junitxml=results/drift/nightly.xml"' in printed
    assert ".venv-nightly/bin/python -m course_utils.tools.drift results/drift/nightly.xml" in printed
    assert (
        "-m pytest -p tests.nbval_plugin" in printed
        and "--nbval --nbval-current-env" in printed
        and '".[test' in printed
    )


BESIDE_MAKE = {  # what is not ours to do
    "bash .ci/run",
    "git config --global core.autocrlf false",
    'cat results/drift/*.md >> "$GITHUB_STEP_SUMMARY"',
}


def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} >= {"ci", "drift"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_read_only_and_know_no_secret(path):
    text = path.read_text()
    assert "secrets" not in text and "pull_request_target" not in text
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        more = job.get("permissions", {})  # to publish the pages, to a job that runs nothing but GitHub's own action
        assert not more or (
            more == {"pages": "write", "id-token": "write"} and not any("run" in s for s in job["steps"])
        )
    used = re.findall(r"uses: (\S+)", text)
    assert used and all(re.fullmatch(r"actions/[\w/-]+@v\d+", action) for action in used)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_do_what_make_does(path):
    verbs = {line.split()[1] for line in make().stdout.splitlines()}
    commands = re.findall(r"run: ([^#\n]+)", path.read_text())
    assert commands
    for command in map(str.strip, commands):
        made = re.fullmatch(r"make ([a-z-]+)( [A-Z]+=\S+)*", command)
        assert command in BESIDE_MAKE or (made and made[1] in verbs), command


@pytest.mark.skipif(os.name != "posix", reason="this makes programs of shell scripts")
def test_ci_installs_once(tmp_path):
    """The environment keeps the options it was made with; a target that is told others, or only some, installs again."""
    for name in ("make", "chromium"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "$* TORCH=$TORCH ENGINES=$ENGINES" >> "{tmp_path}/ran"\n')
        program.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    subprocess.run(["bash", ROOT / ".ci" / "run"], env=environment() | {"PATH": path, "TORCH": "cpu"}, check=True)
    made, tested = (tmp_path / "ran").read_text().splitlines()
    assert made.startswith("setup ENGINES=1 TORCH=cpu") and tested == "test TORCH= ENGINES="


def test_what_is_installed_serves_every_target_that_is_told_nothing(bare):
    (bare / "installed").write_text("cpu engines\n")
    for options, installs in ([], False), (["TORCH=cpu", "ENGINES=1"], False), (["TORCH=cpu"], True):
        printed = make("-n", "test", "INSTALLED=installed", *options, cwd=bare).stdout
        assert "pytest" in printed and ("pip install" in printed) == installs


def test_nightly_is_tried_only_where_its_address_is_known():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "drift.yml").read_text())
    tried = workflow["jobs"]["notebooks"]["strategy"]["matrix"]["torch"]
    assert tried == """${{ fromJSON(vars.TORCH_INDEX && '["newest", "nightly"]' || '["newest"]') }}"""


def test_every_system_is_tested():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert {"ubuntu-latest", "macos-latest", "windows-latest"} <= set(re.findall(r"[a-z]+-latest", text))
