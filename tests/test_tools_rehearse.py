"""The rehearsals of Binder and Colab take what a clone would hold, follow its lists to the letter, and lend it nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from course_utils.tools import copy_checkout, rehearse
from tests.toys import ROOT

GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost"]


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a committed file that was changed since, a new one, a deleted one and an ignored one."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name, text in {"kept.txt": "old", "gone.txt": "x", ".gitignore": "ignored*\n", "ignored-but-ours": "y"}.items():
        (folder / name).write_text(text)
    for arguments in (["init", "-q"], ["add", "--force", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*GIT, *arguments], cwd=folder, check=True)
    (folder / "kept.txt").write_text("new")
    (folder / "gone.txt").unlink()
    (folder / "a folder").mkdir()
    (folder / "a folder" / "new.txt").touch()
    (folder / "ignored").touch()
    return folder


def test_a_clone_of_the_snapshot_holds_the_checkout_as_it_is_now(checkout, tmp_path):
    repository = rehearse.snapshot(tmp_path / "repository", "v1.0", checkout)
    clone = ["git", "clone", "-q", "--depth", "1", "--branch", "v1.0", repository.as_uri(), str(tmp_path / "clone")]
    subprocess.run(clone, check=True)
    files = [path for path in (tmp_path / "clone").rglob("*") if path.is_file() and ".git" not in path.parts]
    names = {path.relative_to(tmp_path / "clone").as_posix() for path in files}
    assert names == {"kept.txt", ".gitignore", "ignored-but-ours", "a folder/new.txt"}
    assert (tmp_path / "clone" / "kept.txt").read_text() == "new"


def test_a_copy_holds_the_checkout_as_it_is_now_each_time(checkout, tmp_path):
    for text in ("new", "newer"):
        (checkout / "kept.txt").write_text(text)
        copy_checkout(tmp_path / text, checkout)
        assert (tmp_path / text / "kept.txt").read_text() == text
        assert sorted(path.name for path in (tmp_path / text).iterdir()) == [
            ".gitignore", "a folder", "ignored-but-ours", "kept.txt"
        ]  # fmt: skip


def test_a_folder_that_is_no_clone_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(rehearse.RehearsalError, match="is no clone"):
        rehearse.snapshot(tmp_path / "repository", "main", tmp_path)


def test_nothing_of_this_python_and_this_user_is_lent(monkeypatch, tmp_path):
    for name in ("PYTHONPATH", "COURSE_DATA", "JUPYTER_CONFIG_DIR", "VIRTUAL_ENV", "MAKEFLAGS", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("HTTPS_PROXY", "kept")
    for home in (tmp_path, tmp_path / "other"):
        environment = rehearse.alone(home, home / "bin")
        assert "x" not in environment.values() and environment["HTTPS_PROXY"] == "kept"
        assert environment["HOME"] == environment["USERPROFILE"] == str(home)
        assert environment["PATH"].startswith(f"{home / 'bin'}{os.pathsep}") and environment["PYTHONNOUSERSITE"] == "1"


def test_the_list_is_the_one_that_conda_reads():
    version, lines = rehearse.conda_list((ROOT / "environment.yml").read_text())
    assert version == "3.11" and lines == ["--require-hashes", "-r requirements.lock"]
    with pytest.raises(rehearse.RehearsalError, match="numpy"):
        rehearse.conda_list("dependencies: [python=3.11, numpy, pip, {pip: [torch]}]")
    with pytest.raises(rehearse.RehearsalError, match="only python"):
        rehearse.conda_list("dependencies: [pip, {pip: [torch]}]")


@pytest.fixture
def commands(monkeypatch):
    """What a rehearsal runs, its results being in `codes` (by a word of the command; 0 if none)."""
    ran, codes = [], {}

    def run(command, cwd=None, env=None, **options):
        words = " ".join(map(str, command))
        ran.append((words, Path(cwd) if cwd else None, env))
        if "venv" in words and "-m venv" in words:
            (Path(command[-1]) / "bin").mkdir(parents=True, exist_ok=True)
        code = next((code for word, code in codes.items() if word in words), 0)
        return SimpleNamespace(returncode=code, stdout=rehearse.VERSION)

    def clone(repository, target):
        target.mkdir()
        shutil.copy(ROOT / "postBuild", target)
        return target

    monkeypatch.setattr(rehearse, "VERSION", "3.11", raising=False)
    monkeypatch.setattr(rehearse.subprocess, "run", run)
    monkeypatch.setattr(rehearse, "_clone", clone)
    return SimpleNamespace(ran=ran, codes=codes)


def test_binder_builds_what_the_files_say_and_runs_the_notebooks_from_the_clone(commands, capsys):
    assert rehearse.binder(sys.executable, ["00"]) == 0
    words = [words for words, _, _ in commands.ran]
    assert [text for text in words if "install" in text][0].endswith("-m pip install -q -r condaenv.requirements.txt")
    assert "bash postBuild" in words and "--torch-backend" not in "".join(words)
    assert words[-1].endswith("-m course_utils.tools.run --fast --only 00")
    assert all(folder.name == "course" for _, folder, _ in commands.ran if folder)
    environments = [env for _, _, env in commands.ran if env]
    assert environments and all(env["HOME"] not in ("", str(Path.home())) for env in environments)
    assert "built in" in capsys.readouterr().out


def test_where_the_cpu_builds_cannot_be_had_the_default_ones_are_taken_and_that_is_said(commands, capsys):
    commands.codes["bash postBuild"] = 1
    rehearse.binder(sys.executable, [])
    (again,) = [words for words, _, _ in commands.ran if words.startswith("bash -c")]
    assert "-r requirements-torch.txt" in again and "--torch-backend" not in again
    assert "could not be had" in capsys.readouterr().out
    commands.codes["bash -c"] = 1
    with pytest.raises(rehearse.RehearsalError, match="this failed: bash -c"):
        rehearse.binder(sys.executable, [])


def test_binder_does_not_build_on_another_python(commands, monkeypatch):
    monkeypatch.setattr(rehearse, "VERSION", "3.12")
    with pytest.raises(rehearse.RehearsalError, match="asks for Python 3.11, and .* is 3.12"):
        rehearse.binder("python3.12", [])
    assert len(commands.ran) == 1


def test_a_python_that_is_not_there_is_one_sentence(capsys):
    assert rehearse.main(["colab", "--python", "no-such-python"]) == 2
    assert capsys.readouterr().err == (
        "make colab: there is no no-such-python: install it, or say PYTHON=/path/to/it.\n"
    )


@pytest.mark.parametrize(("place", "python"), [("binder", sys._base_executable), ("colab", "python3.12")])
def test_each_place_is_rehearsed_on_its_python_and_ends_with_the_code_of_the_notebooks(monkeypatch, place, python):
    asked = []
    monkeypatch.setattr(rehearse.shutil, "which", lambda name: name)
    monkeypatch.setattr(rehearse, place, lambda python, only: asked.append((python, only)) or len(only))
    assert rehearse.main([place]) == 0
    assert rehearse.main([place, "--python", "pypy", "--only", "00", "03"]) == 2
    assert asked == [(python, []), ("pypy", ["00", "03"])]


def test_colab_is_what_the_course_takes_for_colab():
    code = "import sys; assert 'google.colab' in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(rehearse.COLAB)}, check=True)


def test_on_colab_kernels_have_the_address_and_not_the_course(commands, tmp_path, monkeypatch):
    def snapshot(folder, branch):
        (folder / "notebooks").mkdir(parents=True)
        return folder

    monkeypatch.setattr(rehearse, "snapshot", snapshot)
    commands.codes["sys.exit(run("] = 7
    assert rehearse.colab("python3.12", ["00"], tmp_path / "env") == 7
    installed = [words for words, _, _ in commands.ran if "install" in words]
    rehearse.colab("python3.12", ["00"], tmp_path / "env")  # the environment is kept
    assert [words for words, _, _ in commands.ran if "install" in words] == installed and len(installed) == 1
    words, _, environment = commands.ran[-1]
    assert environment["COURSE_REPOSITORY"].startswith("file://") and environment["PYTHONPATH"] == str(rehearse.COLAB)
    assert words.endswith("00")
    rehearse.colab("python3.13", ["00"], tmp_path / "env")
    assert len([words for words, _, _ in commands.ran if "install" in words]) == 2
