"""The first cell of every notebook: get ready on Colab or in a workspace, and say where this machine is too small.

What a notebook needs was measured, and `make needs` measures it again. Nothing here imports torch or numpy.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from . import cpu, files, workspace

ROOT = Path(__file__).resolve().parents[1]
NEEDS = "needs.json"
COLABS_OWN = ("torch", "torchvision", "numpy")  # it loads them at its start: another version would need a restart
NOT_IN_LESSONS = ("ipykernel", "jupyterlab", "papermill")  # they run the notebooks elsewhere


def begin(number):
    """Prepare a notebook, `number` being "00" to "06": quick and silent, but on Colab and on small machines.

    On Colab it installs the packages that are missing there, and leaves torch, torchvision and numpy alone. Where memory or
    cores are fewer than the notebook was measured with, it prints one line. In a workspace (`workspace.start`) progress and
    results are kept there. Raises `RuntimeError` where Colab's torch is not one that the course runs on, with what to do, and
    `DataFileError` where there are no data.
    """
    if "google.colab" in sys.modules:
        _prepare_colab()
    workspace.enter(Path.cwd())
    sentences = shortages(number)
    if sentences:
        print(" ".join(sentences))


def shortages(number):
    """Return what this machine lacks for the notebook: a list of sentences, empty when nothing or when nobody measured it."""
    need = _needs().get(number)
    if need is None:
        return []
    sentences, memory, cores = [], cpu.memory_gib(), cpu.cores()
    if memory is not None and memory * 1024 < need["memory_mib"]:
        sentences.append(
            f"This machine has {memory} GiB of memory, and this notebook took {need['memory_mib'] / 1024:.1f}, most of it in "
            f"section “{need['section']}”: it may stop there. Close other programs, or take smaller numbers in the third code cell."
        )
    if cores < need["cores"]:
        sentences.append(
            f"This machine has {cores} core{'s' * (cores > 1)}, and this notebook took {need['seconds']} s on {need['cores']}: "
            "it will take longer."
        )
    return sentences


def _needs():
    path = files.data_dir() / NEEDS
    try:
        notebooks = json.loads(path.read_text(encoding="utf-8"))["notebooks"]
        return {name[:2]: need for name, need in notebooks.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it is advice: without it the lesson goes on
        return {}


def _prepare_colab():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.version import Version

    with open(ROOT / "pyproject.toml", "rb") as file:
        requirements = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]
    missing = []
    for requirement in requirements:
        version = _version(requirement.name)
        if requirement.name == "torch":
            # A local part, as in 2.11.0+cpu, does not count.
            if version is None or not requirement.specifier.contains(Version(version).public, prereleases=True):
                raise RuntimeError(
                    f"This Colab session has torch {version}, and the course needs {requirement.specifier}. In the menu, choose "
                    "Runtime → Change runtime type → Runtime version → Latest (an earlier one if torch is too new), and run this "
                    "cell again."
                )
        elif version is None and requirement.name not in (*COLABS_OWN, *NOT_IN_LESSONS):
            missing.append(str(requirement))
    if missing:
        print(f"Installing what Colab lacks: {', '.join(missing)}.")
        # Without their dependencies, which could bring another numpy.
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing], check=True)
    # The lessons start processes of their own, which do not know this one's path.
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
