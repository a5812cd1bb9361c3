"""Rehearse what Binder and Colab do with the course, in places where nothing else is: `make binder`, `make colab`.

Both work on what a clone would hold: the files of this checkout that git has or would take, as they are now. The notebooks run
on smaller numbers, as `make run-all FAST=1` does, and the committed ones stay as they are.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from course_utils.tools import badges, copy_checkout, small

ROOT = Path(__file__).resolve().parents[2]
COLAB = ROOT / "tests" / "colab"  # what Colab has, and what it looks like
# Of the environment, what would lead to this machine's own Python, notebooks or course.
OURS = ("PYTHON", "VIRTUAL_ENV", "CONDA", "PYENV", "JUPYTER", "IPYTHON", "COURSE", "XDG", "MAKE", "MFLAGS", "MPL")
CPU_BUILDS = " --torch-backend=cpu"


class RehearsalError(RuntimeError):
    """The rehearsal cannot begin, or a step of it failed; the message says which and what to do."""


def snapshot(folder, branch, root=ROOT):
    """Make a git repository in `folder`, new, whose one commit on `branch` has the files of the checkout `root` as they are."""
    try:
        copy_checkout(folder, root)
    except (OSError, subprocess.CalledProcessError):
        raise RehearsalError(f"{root.name} is no clone, or there is no git") from None
    author = ["-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost", "-c", "core.autocrlf=false"]
    for arguments in (["init", "-q", "-b", branch], ["add", "-A", "--force"], ["commit", "-q", "-m", "Rehearsal"]):
        subprocess.run(["git", *author, *arguments], cwd=folder, check=True)
    return folder


def alone(home, programs):
    """Return an environment in which a clone is alone: a new `home`, the folder `programs` first, nothing of this Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return kept | {"HOME": str(home), "USERPROFILE": str(home), "PATH": path, "PYTHONNOUSERSITE": "1"}


def conda_list(text):
    """Return what an environment.yml asks for: the version of Python, and the lines that pip gets.

    Raises `RehearsalError` for anything else in it, because that would need conda.
    """
    dependencies = yaml.safe_load(text)["dependencies"]
    lines = [line for entry in dependencies if isinstance(entry, dict) for line in entry["pip"]]
    others = [entry for entry in dependencies if isinstance(entry, str) and entry != "pip"]
    if len(others) != 1 or not others[0].startswith("python="):
        raise RehearsalError(
            f"environment.yml has {others} beside pip, and without conda only python=... can be rehearsed"
        )
    return others[0].partition("=")[2], lines


def binder(python, only):
    """Build the environment of a clone as Binder's builder does, and run the notebooks in it on one core and 2 GiB.

    python: the interpreter to build on. Returns the exit code of the run; raises `RehearsalError` when it cannot be built.
    """
    version, lines = conda_list((ROOT / "environment.yml").read_text(encoding="utf-8"))
    show = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    if (found := subprocess.run(show, capture_output=True, text=True).stdout.strip()) != version:
        raise RehearsalError(
            f"environment.yml asks for Python {version}, and {python} is {found or 'none'}: say PYTHON=..."
        )
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        home, programs = scratch / "home", scratch / "env" / "bin"
        home.mkdir()
        environment = alone(home, programs)
        course = _clone(scratch / "repository", home / "course")
        began = time.monotonic()
        _step([python, "-m", "venv", scratch / "env"], course, environment)
        (course / "condaenv.requirements.txt").write_text("\n".join(lines) + "\n")  # as conda hands them to pip
        _step(
            [programs / "python", "-m", "pip", "install", "-q", "-r", "condaenv.requirements.txt"], course, environment
        )
        _post_build(course, environment)
        size = sum(path.lstat().st_size for path in (scratch / "env").rglob("*"))
        print(f"built in {time.monotonic() - began:.0f} s: {size / 1e9:.1f} GB", flush=True)
        run = [programs / "python", "-m", "course_utils.tools.run", "--fast", *(["--only", *only] if only else [])]
        try:
            with small.limited():
                limit = [programs / "python", "-m", "course_utils.tools.small"]
        except OSError as error:
            print(f"No limit of memory can be set here ({error}): the notebooks run without.", file=sys.stderr)
            limit = []
        return subprocess.run([*limit, *run], cwd=course, env=environment).returncode


def _post_build(course, environment):
    if subprocess.run(["bash", "postBuild"], cwd=course, env=environment).returncode == 0:
        return
    text = (course / "postBuild").read_text(encoding="utf-8")
    print("torch's CPU builds could not be had: once more with the default ones, which are larger.", flush=True)
    _step(["bash", "-c", text.replace(CPU_BUILDS, "")], course, environment)


def colab(python, only, venv=ROOT / ".venv-colab"):
    """Run the notebooks as on Colab: with its packages, its module, and nothing of the course but what their first cell fetches.

    python: the interpreter to build on; the environment is kept in `venv`. Returns the exit code of the run.
    """
    wanted = (COLAB / "requirements.txt").read_bytes()
    stamp, programs = venv / ".installed", venv / "bin"
    mark = hashlib.sha256(wanted + str(python).encode()).hexdigest()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        content, home = scratch / "content", scratch / "home"
        home.mkdir()
        environment = alone(home, programs)
        if not stamp.exists() or stamp.read_text() != mark:
            _step([python, "-m", "venv", "--clear", venv], scratch, environment)
            # papermill runs the notebooks, and Colab has none; in the lessons it is not missed.
            pip = [programs / "python", "-m", "pip", "install", "-q", "papermill"]
            _step([*pip, "-r", COLAB / "requirements.txt"], scratch, environment)
            stamp.write_text(mark)
        repository = snapshot(scratch / "repository", badges.setting().branch)
        shutil.copytree(repository / "notebooks", content)
        environment |= {"COURSE_REPOSITORY": repository.as_uri(), "PYTHONPATH": str(COLAB)}
        # The runner has the course on its path, and the kernels that it starts do not.
        code = "import sys; sys.path.insert(0, sys.argv[1]); from course_utils.tools.run import run\n"
        code += "sys.exit(run(sys.argv[2], only=sys.argv[4:], fast=True, results=sys.argv[3]))"
        command = [programs / "python", "-c", code, repository, content, scratch / "results", *only]
        return subprocess.run(command, cwd=scratch, env=environment).returncode


def _clone(repository, target):
    snapshot(repository, badges.setting().branch)
    subprocess.run(["git", "clone", "-q", "--depth", "1", repository.as_uri(), str(target)], check=True)
    return target


def _step(command, folder, environment):
    if subprocess.run(command, cwd=folder, env=environment).returncode:
        raise RehearsalError(f"this failed: {' '.join(map(str, command))[:200]}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("place", choices=["binder", "colab"])
    parser.add_argument(
        "--python", help="the interpreter to build on (default: this one's for Binder, python3.12 for Colab)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NN", help="notebooks that begin with these, e.g. 03")
    options = parser.parse_args(arguments)
    place = {"binder": binder, "colab": colab}[options.place]
    python = options.python or {"binder": sys._base_executable, "colab": "python3.12"}[options.place]
    try:
        if shutil.which(python) is None:
            raise RehearsalError(f"there is no {python}: install it, or say PYTHON=/path/to/it")
        return place(python, options.only)
    except RehearsalError as error:
        print(f"make {options.place}: {error}.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
