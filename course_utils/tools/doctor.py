"""Say what this machine has for the course and how to mend what is missing: `make doctor`.

The output names no paths and no users: it is meant to be pasted into a report. `make doctor JSON=ada.json NAME=Ada` keeps it
in a file besides, for a teacher who collects those of a class (`make class`); the name is whatever the learner likes.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from course_utils import cpu, files

try:
    import tomllib

    import psutil
    from packaging.requirements import Requirement
    from packaging.version import Version
except ModuleNotFoundError as error:  # the commonest trouble of all: this is not the course's environment
    sys.exit(f"FAIL  Python {platform.python_version()} has no {error.name}  → run `make setup`, then `make doctor`")

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
RECORD = 1  # version of what --json writes
SETUP = "run `make setup`"
LOW_MEMORY_GIB = 2  # what a Binder session has; every notebook stays under 1.5
ENGINES = {
    "onnxruntime": "make setup ENGINES=1",
    "openvino": "make setup ENGINES=1",
    "nncf": "make setup ENGINES=1",
    "executorch": "make setup ENGINES=1",
    "tensorrt": "pip install tensorrt, on a machine with an NVIDIA GPU",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: status is "OK", "WARN" or "FAIL"."""

    status: str
    what: str
    found: str
    fix: str = ""

    def __str__(self):
        return f"{self.status:4}  {self.what:18}  {self.found}" + (f"  → {self.fix}" if self.fix else "")


def examine():
    """Return all findings, in the order to read them."""
    software = (python, torch_and_vision, torchao, packages)
    machine = (processor, int8_engines, memory, compiler, folders)
    return [finding for part in (*software, *machine, engines, data_files) for finding in part()]


def python():
    """Yield whether this Python is one that the course supports."""
    wanted = _project()["requires-python"]
    fits = Requirement(f"python {wanted}").specifier.contains(platform.python_version())
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if fits:
        yield Finding("OK", "Python", found)
    else:
        yield Finding("FAIL", "Python", f"{found}, wanted {wanted}", "make setup PYTHON=python3.11 in a clean checkout")


def torch_and_vision():
    """Yield whether torch and torchvision belong together and load; `packages` speaks when one is missing."""
    versions = {name: _version(name) for name in ("torch", "torchvision")}
    if None in versions.values():
        return
    if problem := _import_error("torch"):
        yield Finding("FAIL", "torch", f"{versions['torch']}: {problem}", SETUP)
        return
    yield Finding("OK", "torch", versions["torch"])
    problem = mismatch("torchvision", "torch", versions["torch"]) or _import_error("torchvision")
    if problem:
        yield Finding("FAIL", "torchvision", f"{versions['torchvision']}: {problem}", SETUP)
    else:
        yield Finding("OK", "torchvision", f"{versions['torchvision']}, matches torch")


def mismatch(package, dependency, version, requirements=None):
    """Return why `version` of `dependency` is not what `package` asks for, or None if it is.

    Local parts such as "+cpu" do not count. requirements: `package`'s own list, read from its metadata by default.
    """
    for line in importlib.metadata.requires(package) or () if requirements is None else requirements:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == dependency and applies and not _fits(version, requirement):
            return f"wants {dependency} {requirement.specifier}, found {version}"
    return None


def _fits(version, requirement):
    # A pre-release, or a build such as 2.14.1+cpu, is as good as its number.
    return requirement.specifier.contains(Version(version).public, prereleases=True)


def torchao():
    """Yield whether torchao, which the course can do without, loads with this torch."""
    version = _version("torchao")
    if version is None:
        yield Finding("OK", "torchao", "not installed (optional)", "make setup ENGINES=1")
    elif problem := _import_error("torchao"):
        yield Finding("WARN", "torchao", f"{version}: {problem}", "pip uninstall torchao, or make setup ENGINES=1")
    else:
        yield Finding("OK", "torchao", version)


def packages():
    """Yield every package that is missing or outside the range in pyproject.toml."""
    requirements = [Requirement(line) for line in _project()["dependencies"]]
    wrong = 0
    for requirement in requirements:
        version = _version(requirement.name)
        if version is None or not _fits(version, requirement):
            wrong += 1
            found = f"{version or 'not installed'}, wanted {requirement.specifier}"
            yield Finding("FAIL", requirement.name, found, SETUP)
    if not wrong:
        yield Finding("OK", "packages", f"all {len(requirements)} in range")


def processor():
    """Yield the processor and the instruction sets that decide how fast INT8 is on it."""
    flags = cpu.flags()
    threads = "" if _version("torch") is None or _import_error("torch") else f", torch uses {_threads()}"
    yield Finding("OK", "CPU", f"{cpu.name()}, {cpu.cores()} cores{threads}")
    arm = platform.machine().lower() in ("arm64", "aarch64")
    families = {"NEON": ("asimd", "asimddp", "i8mm", "sve")} if arm else {
        "AVX2": ("avx2",),
        "AVX512": ("avx512f",),
        "VNNI": ("avx512_vnni", "avx_vnni"),
        "AVX512_BF16": ("avx512_bf16",),
        "AMX": ("amx_int8",),
    }  # fmt: skip
    for family, members in families.items():
        present = [flag for flag in members if flag in flags]
        if present:
            yield Finding("OK", family, "; ".join(f"{flag}: {cpu.ISA_FLAGS[flag]}" for flag in present))
        elif family == "AVX2":
            yield Finding("WARN", family, "absent: INT8 kernels are slow", "a newer machine for notebook 04")
        elif family == "VNNI":
            yield Finding("WARN", family, "absent: INT8 gains less and may saturate", "the notebooks say where")
        else:
            yield Finding("OK", family, "absent (nothing in the course needs it)")


def int8_engines():
    """Yield which INT8 engines run here and which of them the lessons use, then every other one with the reason."""
    if _version("torch") is None or _import_error("torch"):
        return
    from course_utils import backends

    found = backends.engines()
    running = [engine.name for engine in found if engine.runs and engine.name not in backends.FLOAT_ONLY]
    try:
        yield Finding("OK", "INT8 engines", f"{', '.join(running)}; by default: {backends.default_engine()}")
    except RuntimeError:
        yield Finding("FAIL", "INT8 engines", "none in this build of torch", SETUP)
    for engine in found:
        absent = engine.name in ENGINES and _version(engine.name) is None  # which `engines` says
        if not engine.runs and not absent:
            yield Finding("OK", f"engine {engine.name}", _without_paths(f"does not run (optional): {engine.why}"))


def memory():
    """Yield the memory this process may use, and whether enough of it is free."""
    available = psutil.virtual_memory().available / 2**30
    total = cpu.memory_gib()
    available = min(available, total or available)
    found = f"{total} GiB, {available:.1f} GiB available"
    if available < LOW_MEMORY_GIB:
        yield Finding("WARN", "memory", found, f"close programs: the notebooks want {LOW_MEMORY_GIB} GiB")
    else:
        yield Finding("OK", "memory", found)


def compiler():
    """Yield whether there is a C++ compiler, which only torch.compile needs."""
    names = [os.path.basename(os.environ.get("CXX", "")), "c++", "g++", "clang++", "cl"]
    found = next((name for name in names if name and shutil.which(name)), None)
    if found:
        yield Finding("OK", "C++ compiler", found)
    else:
        yield Finding("OK", "C++ compiler", "not found (optional, for torch.compile)", "install g++ or clang")


def folders():
    """Yield whether the checkout and the home of this user take files."""
    if files.is_writable(PYPROJECT.parent):
        yield Finding("OK", "checkout", "takes files")
    else:
        fix = "a clone of your own, to keep what you do; results go to the temporary folder meanwhile"
        yield Finding("WARN", "checkout", "cannot be written", fix)
    if files.is_writable(os.path.expanduser("~")):
        yield Finding("OK", "home", "takes files")
    else:
        yield Finding("WARN", "home", "cannot be written, and Jupyter needs one", "HOME=$(mktemp -d) make lab")


def engines():
    """Yield which optional engines are here, and how to get the others."""
    for name, how in ENGINES.items():
        version = _version(name)
        yield Finding("OK", name, version) if version else Finding("OK", name, "not installed (optional)", how)


def data_files():
    """Yield every file of `data/` that is missing, truncated or altered."""
    try:
        names = list(files.read_manifest())
        folder = str(files.data_dir())
    except files.DataFileError as error:
        yield Finding("FAIL", "data", _without_paths(str(error)))
        return
    wrong = 0
    for name in names:
        try:
            files.verified(name)
        except files.DataFileError as error:
            wrong += 1
            yield Finding("FAIL", "data", _without_paths(str(error).replace(folder, "data")))
    if not wrong:
        yield Finding("OK", "data", f"{len(names)} files, all as in the manifest")


def _project():
    with open(PYPROJECT, "rb") as file:
        return tomllib.load(file)["project"]


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_error(name):
    try:
        importlib.import_module(name)
    except Exception as error:  # broken binaries raise anything from ImportError to RuntimeError
        first_line = str(error).partition("\n")[0]
        return f"does not load ({type(error).__name__}: {_without_paths(first_line)})"
    return None


def _threads():
    import torch

    return f"{torch.get_num_threads()} threads"


def _without_paths(text):
    for path in (PYPROJECT.parent, Path(sys.prefix), Path.home()):
        text = text.replace(f"{path}{os.sep}", "").replace(str(path), "~")
    return text


def record(findings, name):
    """Return the findings as a dict that JSON can hold, with the facts by which the machines of a class are compared."""
    flags = cpu.flags()
    return {
        "doctor": RECORD,
        "name": name,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "cpu": cpu.name(),
            "cores": cpu.cores(),
            "memory_gib": cpu.memory_gib(),
            "isa": [flag for flag in cpu.ISA_FLAGS if flag in flags],
            "engine": _default_engine(),
        },
        "findings": [asdict(finding) for finding in findings],
    }


def _default_engine():
    if _version("torch") is None or _import_error("torch"):
        return None
    from course_utils import backends

    try:
        return backends.default_engine()
    except RuntimeError:
        return None


def main(arguments=()):
    """Print the findings, and keep them where the arguments say; return 1 if any is FAIL, else 0."""
    parser = argparse.ArgumentParser(prog="python -m course_utils.tools.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the findings in this file, too")
    parser.add_argument("--name", help="what to call this machine in it; the name of the file if left out")
    options = parser.parse_args(arguments)
    findings = examine()
    failed = sum(finding.status == "FAIL" for finding in findings)
    print(*findings, sep="\n")
    print(f"\n{failed} to mend." if failed else "\nReady.")
    if options.json:
        try:
            kept = record(findings, options.name or options.json.stem)
            files.write_text(options.json, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"Not kept: {options.json} cannot be written ({error.strerror}).", file=sys.stderr)
            return 2
        print(f"Kept in {options.json}, for your teacher.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
