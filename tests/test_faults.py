"""What goes wrong on other machines: each fault ends in a clear message, and what was there before is as it was.

Faults of one module alone are tested with that module: damaged data and checkpoints (test_files, test_data, test_models,
test_int4, test_backends), ledgers (test_ledger) and progress (test_progress), engines, compilers and torchao that are missing
or broken (test_backends_*), what the doctor says of all of them (test_tools_doctor).
"""

import contextlib
import importlib
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy
import psutil
import pytest
import torch

from course_utils import backends, data, files, int4, ledger, loading, models, report, smollm, training
from course_utils.tools import arms, doctor, run, train_lm
from tests.test_backends import SmallCNN
from tests.test_tools_run import RECORD, launch, outputs, recorded, wait_for
from tests.toys import ROOT, write_notebook

progress = importlib.import_module("course_utils.exercises.progress")  # a function of the package has the same name

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


@pytest.fixture(autouse=True)
def importable_course(monkeypatch):
    """Kernels find `course_utils` even where it is not installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


# Processes that die


def alive(processes):
    """The processes that still run; one that ended and that nobody asked about is a zombie."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@posix
def test_a_killed_runner_leaves_no_kernel_and_nothing_half_written_and_the_next_one_can_start(tmp_path):
    sleep = "import time\nopen('started', 'w').close()\ntime.sleep(600)"
    path = write_notebook(tmp_path / "00_slow.ipynb", RECORD.format(quantity="early"), sleep)
    before = path.read_bytes()
    program = "import sys; from course_utils.tools.run import run; sys.exit(run(sys.argv[1], ledger=sys.argv[2]))"
    command = [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "ledger.json")]
    runner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "started").exists)
        kernels = psutil.Process(runner.pid).children(recursive=True)
        second = launch(tmp_path)
    finally:
        runner.kill()
        runner.wait()
    assert second.code == 2 and "Another run of these notebooks is under way" in second.err
    assert kernels
    wait_for(lambda: not alive(kernels), seconds=20)
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} <= {"00_slow.ipynb", "started", ".run.lock"}
    write_notebook(path, RECORD.format(quantity="again"))
    assert launch(tmp_path).code == 0 and recorded(tmp_path / "ledger.json") == {"again"}


@posix
def test_a_kernel_that_dies_of_memory_is_named_as_such_and_its_notebook_is_as_it_was(tmp_path):
    limit = (
        "import psutil, resource\n"
        "limit = psutil.Process().memory_info().vms + 2**28\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "[bytes(2**26) for _ in range(8)]"
    )
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"  # as the system does
    sources = {"00_killed": killed, "01_limited": limit}
    for name, source in sources.items():
        write_notebook(tmp_path / f"{name}.ipynb", RECORD.format(quantity=name), source, "print('never')")
    write_notebook(tmp_path / "02_after.ipynb", RECORD.format(quantity="02_after"))
    before = {name: (tmp_path / f"{name}.ipynb").read_bytes() for name in sources}
    result = launch(tmp_path)
    assert result.code == 1
    killed, limited = result.err.split("01_limited failed: ")
    assert "00_killed failed: cell 2/3: the kernel died: killed by SIGKILL; the system does that when memory" in killed
    assert limited.startswith("cell 2/3: MemoryError: ") and "\nMemory ran out: close other programs, " in limited
    assert {name: (tmp_path / f"{name}.ipynb").read_bytes() for name in sources} == before
    assert recorded(result.ledger) == {"02_after"}


@pytest.mark.parametrize(
    "ask",
    [lambda: bytes(2**60), lambda: numpy.zeros(2**50), lambda: torch.zeros(2**50), lambda: os.strerror(12)],
    ids=["Python", "NumPy", "torch", "system"],
)
def test_whoever_says_that_memory_ran_out_is_understood(ask):
    try:
        said = ask()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert run.OUT_OF_MEMORY.search(said)
    assert not run.OUT_OF_MEMORY.search("ZeroDivisionError: division by zero")


# A full disk

Usage = namedtuple("Usage", "total used free")


class FullDevice:
    """What is written to a new temporary file goes to the system's full device, and meets its error there."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch

    def fill(self, ending=""):
        make = files.tempfile.mkstemp

        def mkstemp(*args, **options):
            handle, name = make(*args, **options)
            if name.endswith(f"{ending}.partial"):
                Path(name).unlink()
                Path(name).symlink_to("/dev/full")
            return handle, name

        self.monkeypatch.setattr(files.tempfile, "mkstemp", mkstemp)
        self.monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage(2**30, 2**30, 0))


class FullDisk:
    """A small disk of its own."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self):
        with open(self.folder / "filler", "wb", buffering=0) as file:
            for size in (2**16, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))


@pytest.fixture
def full_device(tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no full device")
    return FullDevice(tmp_path, monkeypatch)


@pytest.fixture(params=["device", "disk"])
def full(request, tmp_path):
    """A folder, and a way to fill the disk that it is on."""
    if request.param == "device":
        yield request.getfixturevalue("full_device")
        return
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield FullDisk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def toy_images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 28, 28), dtype=torch.uint8, generator=generator)
    return data.Images(pixels, torch.arange(32) % 10, 28)


def train(path):
    """Train until there is a resume file and stop, or go on from the one that is there."""

    def stop(step, model):
        if new and step == 1:
            raise KeyboardInterrupt

    new = not path.exists()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 28 * 28, 10))
    with contextlib.suppress(KeyboardInterrupt):
        training.finetune(model, toy_images(), steps=9, resume=path, save_every=1, on_step=stop)


def quantized():
    return backends.quantize_static(SmallCNN().eval(), [torch.rand(4, 3, 32, 32)])


WRITERS = {
    "ledger.json": lambda path: ledger.merge(path.with_name("none.json"), path),
    "mine.csv": lambda path: progress.export(path, [{"id": "zero-point"}]),
    "resume.pt": train,
    "int8.safetensors": lambda path: backends.save(quantized(), path),
    "packed.safetensors": lambda path: int4.save_packed(models.build("mobilenet_v2"), path),
}
# safetensors writes beside the file that it is given, and renames: only a disk can be full for it.
CASES = [("disk", name) for name in WRITERS] + [
    ("device", name) for name in WRITERS if not name.endswith("safetensors")
]


@pytest.mark.parametrize(("full", "name"), CASES, indirect=["full"])
def test_a_full_disk_is_named_with_the_file_and_what_was_there_stays(full, name):
    path = full.folder / name
    WRITERS[name](path)
    full.fill()
    before = {p.name: p.read_bytes() for p in full.folder.iterdir() if p.is_file()}
    assert name in before
    with pytest.raises(OSError, match=f"No space left on device: '.*{name}'"):
        WRITERS[name](path)
    assert {p.name: p.read_bytes() for p in full.folder.iterdir() if p.is_file()} == before


def test_a_full_disk_costs_a_learner_one_entry_of_progress_and_no_verdict(full, monkeypatch):
    path = full.folder / "progress.json"
    monkeypatch.setenv("COURSE_PROGRESS", str(path))
    assert progress.note("zero-point", True) is None
    before = path.read_bytes()
    full.fill()
    said = progress.note("per-channel", True)
    assert said.startswith(f"(not remembered: {path} cannot be written: No space left on device")
    assert path.read_bytes() == before


@pytest.mark.parametrize("ending", [".ipynb", ".json"])
def test_where_there_is_no_room_for_a_notebook_or_its_numbers_neither_is_replaced(tmp_path, full_device, ending):
    path = write_notebook(tmp_path / "00_toy.ipynb", RECORD.format(quantity="old"))
    assert launch(tmp_path).code == 0
    write_notebook(path, RECORD.format(quantity="new"))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    full_device.fill(ending)
    result = launch(tmp_path)
    assert result.code == 1 and "Traceback" not in result.err
    assert "00_toy failed: its results cannot be written ([Errno 28] No space left on device: '" in result.err
    assert "notebook and ledger are as they were" in result.err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


# Folders that are read-only, missing, or have strange names


@pytest.fixture
def miniature(tiny_data, tmp_path):
    """A small course in a folder with spaces and letters of several alphabets, and an environment that says nothing of this one."""
    folder = tmp_path / "Größen & Maße 量化"
    shutil.copytree(ROOT / "course_utils", folder / "course_utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_data, folder / "data")
    (folder / "notebooks").mkdir()
    (tmp_path / "temporary").mkdir()
    return folder


def run_in(folder, *arguments, before=(), **changes):
    """Run the runner of the course in `folder`; return the completed process. before: the command's beginning."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COURSE_", "XDG_", "JUPYTER", "IPYTHON", "MPL"))}
    changes = {"PYTHONPATH": str(folder), "TMPDIR": str(folder.parent / "temporary")} | changes
    command = [*before, sys.executable, "-B", "-m", "course_utils.tools.run", *arguments]
    return subprocess.run(command, cwd=folder, env=kept | changes, capture_output=True, text=True, timeout=120)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@posix
def test_a_path_of_many_letters_and_a_home_that_takes_no_files_disturb_no_run(miniature):
    write_notebook(
        miniature / "notebooks" / "00_toy.ipynb",
        "from course_utils import files\nprint(files.data_dir())",
        RECORD.format(quantity="here"),
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
    )
    result = run_in(miniature, "--fast", HOME="/dev/null")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    place, _, picture = outputs(miniature / "results" / "fast" / "00_toy.ipynb")
    assert place[0].text == f"{miniature / 'data'}\n"
    assert [output.output_type for output in picture] == ["display_data"]  # and no warning about a home
    assert recorded(miniature / "results" / "fast" / "ledger.json") == {"here"}


def test_data_and_models_are_read_from_a_path_of_many_letters_and_models_are_written_there(miniature, monkeypatch):
    monkeypatch.setenv("COURSE_DATA", str(miniature / "data"))
    name = models.checkpoint("char_lm")
    (miniature / "data" / name).parent.mkdir()
    shutil.copy(ROOT / "data" / name, miniature / "data" / name)
    files.update_manifest(name)
    assert len(data.fashion_mnist("test")) == 20 and type(models.load("char_lm")).__name__ == "CharLM"
    int4.save_packed(models.build("mobilenet_v2"), miniature / "packed")
    assert models.architecture(int4.load_packed(miniature / "packed"))["name"] == "mobilenet_v2"
    backends.save(quantized(), miniature / "int8")
    backends.load(miniature / "int8", model=SmallCNN())
    train(miniature / "resume.pt")
    assert (miniature / "resume.pt").exists()
    train(miniature / "resume.pt")  # to its end
    assert not (miniature / "resume.pt").exists()


def read_only(folder):
    """Make `folder` take no files, and return the beginning of the commands for which that is so."""
    if os.geteuid():
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o555)
        return []
    # Root may write to any folder, but not to a disk that is mounted read-only.
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && cd "$0" && exec "$@"'
    before = ["unshare", "--mount", "sh", "-c", script, str(folder)]
    if not shutil.which("unshare") or subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("root cannot mount anything here")
    return before


@posix
def test_results_of_a_read_only_checkout_go_to_the_temporary_folder_which_is_said(miniature):
    keep = "from course_utils import files\n(files.results_dir() / 'mine.txt').write_text('kept');"
    write_notebook(miniature / "notebooks" / "00_toy.ipynb", RECORD.format(quantity="here"), keep)
    before = contents(miniature)
    command = read_only(miniature)
    assert subprocess.run([*command, "touch", str(miniature / "new")], capture_output=True).returncode
    result = run_in(miniature, before=command)
    assert result.returncode == 0, result.stderr
    (temporary,) = (miniature.parent / "temporary").iterdir()
    instead = temporary / "notebooks"
    assert f"cannot be written: the notebooks and their ledger go to {instead}.\n" in result.stderr
    assert outputs(instead / "00_toy.ipynb")[1][0].text.endswith("(COURSE_RESULTS may name another folder).\n")
    assert recorded(instead / "ledger.json") == {"here"} and (temporary / "mine.txt").read_text() == "kept"
    assert contents(miniature) == before


def test_what_has_no_place_among_the_results_goes_to_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    write_notebook(tmp_path / "notebooks" / "00_toy.ipynb", "1")
    (tmp_path / "notebooks" / "results").write_text("in the way")
    result = launch(tmp_path / "notebooks", fast=True)
    instead = files.temporary_dir() / "fast"
    assert result.code == 0 and outputs(instead / "00_toy.ipynb")
    assert result.err.endswith(f"cannot be written: the notebooks and their ledger go to {instead}.\n")
    assert (tmp_path / "notebooks" / "results").read_text() == "in the way"


# Files that are not what they seem


class Intruder:
    """An object whose pickle makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, (os.environ["COURSE_RESULTS"] + "-intruded",)


PICKLES = {
    "torch.save": lambda path: torch.save({"weight": Intruder()}, path),
    "torch.save of old": lambda path: torch.save(Intruder(), path, _use_new_zipfile_serialization=False),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Intruder(), protocol=2)),
}


def as_data(name, load):
    """Load the data file `name`, with a manifest that says it is the right one."""

    def loader(path):
        target = files.data_dir() / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
        files.update_manifest(name)
        load()

    return loader


def resume(path):
    training.finetune(torch.nn.Linear(1, 1), toy_images(), steps=1, resume=path)


def gguf(path):
    pytest.importorskip("gguf", reason="gguf is not installed (make setup ENGINES=1)")
    smollm.load(path)


LOADERS = {
    "models.load": (as_data(models.checkpoint("resnet18"), lambda: models.load("resnet18")), files.DataFileError),
    "arms.read": (as_data(arms.FILE, arms.read), files.DataFileError),
    "backends.load": (backends.load, ValueError),
    "int4.load_packed": (int4.load_packed, ValueError),
    "training.finetune": (resume, ValueError),
    "train_lm": (lambda path: train_lm._load(path, {}, train_lm.Recipe()), ValueError),
    "loading.load_model": (lambda path: loading.load_model(path, "mobilenet_v2"), Exception),
    "smollm.load": (gguf, ValueError),
    "ledger.read": (ledger.read, ledger.LedgerError),
    "report.read": (report.read, report.ReportError),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", LOADERS)
def test_code_in_a_file_is_not_run(tmp_path, monkeypatch, name, kind):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / files.MANIFEST).write_text("{}")
    path = tmp_path / "model"
    PICKLES[kind](path)
    before = path.read_bytes()
    load, error = LOADERS[name]
    with pytest.raises(error):
        load(path)
    assert path.read_bytes() == before and not list(tmp_path.glob("*-intruded"))


@pytest.mark.parametrize("kind", PICKLES)
def test_the_code_in_those_files_would_be_seen(tmp_path, kind):
    PICKLES[kind](tmp_path / "model")
    with contextlib.suppress(RuntimeError):  # of torch, when it finds no more than a bare pickle, and the harm is done
        torch.load(tmp_path / "model", weights_only=False)
    assert list(tmp_path.glob("*-intruded"))


@pytest.mark.parametrize("content", ['{"version": 0, "records": {}}', '{"version": 1, "rec'], ids=["older", "half"])
def test_a_ledger_that_cannot_be_read_is_said_before_anything_is_run(tmp_path, content):
    path = write_notebook(tmp_path / "00_toy.ipynb", "open('started', 'w').close()")
    (tmp_path / "ledger.json").write_text(content)
    before = contents(tmp_path)
    result = launch(tmp_path)
    assert result.code == 2 and path.exists()
    assert result.err.startswith("Nothing was run: cannot read the ledger ") and "or delete it" in result.err
    assert contents(tmp_path) == before


# Packages that do not belong together


@pytest.fixture
def wrong_torchvision(monkeypatch):
    """A torchvision that was made for another torch."""

    class Wrong:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist\nmore lines")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Wrong, *sys.meta_path])


def test_a_torchvision_of_another_torch_is_one_sentence_with_its_remedy(wrong_torchvision, tiny_data):
    for use in (
        lambda: models.load("resnet18", weights=None),
        lambda: models.load("resnet18", weights="imagenet"),
        lambda: data.fashion_mnist("test"),
    ):
        with pytest.raises(RuntimeError) as caught:
            use()
        assert f"torch {torch.__version__} (operator torchvision::nms does not exist): run `make setup`" in str(
            caught.value
        )
    (found,) = [finding for finding in doctor.torch_and_vision() if finding.status == "FAIL"]
    assert found.what == "torchvision" and "nms does not exist" in found.found and "make setup" in found.fix
    assert "more lines" not in found.found
    assert models.load("char_lm", weights=None)  # which needs no torchvision


def test_the_doctor_survives_a_torch_that_does_not_load(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    command = [sys.executable, "-m", "course_utils.tools.doctor"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stderr == ""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("FAIL  torch ")]
    assert "does not load (OSError: libtorch_cpu.so" in line and line.endswith("→ run `make setup`")
