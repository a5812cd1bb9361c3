"""Run the notebooks in order: `make run-all`, or `python -m course_utils.tools.run [--fast] [--solved] [--only NN ...]`.

A notebook is executed in memory and replaces its committed file in one step, and only when every cell passed; its
numbers go into the ledger at the same moment. Fast mode hands each notebook the smaller numbers of its own metadata
(`course.fast`) as papermill parameters and leaves the results in `results/fast/`. The solved edition has every exercise
filled with its tested solution, and each has to pass; it goes to `results/solved/`.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import filelock
import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from course_utils import files
from course_utils import ledger as ledgers
from course_utils.tools.clean import KERNELSPEC, clean, to_text

ROOT = Path(__file__).resolve().parents[2]
CELL_TIMEOUT = 900  # seconds; a cell that hangs must not hang the run
# What Python and NumPy, C++, torch and the system say.
OUT_OF_MEMORY = re.compile(r"MemoryError|bad_alloc|[Cc]an(no|')t allocate memory")
for chatty in ("papermill", "asyncio"):  # what they would say of a dead or stopped kernel, this file says in one line
    logging.getLogger(chatty).setLevel(logging.CRITICAL)


@dataclass
class Outcome:
    """What became of one notebook: `verdict` is "ok" or what went wrong; `peak` is in MiB, None where unknown."""

    notebook: str
    seconds: float = 0.0
    peak: float | None = None
    verdict: str = "not run"


class NotebookError(Exception):
    """A notebook could not be run to its end; the message names the cell and the error."""


def run(
    folder=ROOT / "notebooks",
    *,
    only=(),
    fast=False,
    solved=False,
    results=ROOT / "results",
    ledger=None,
    timeout=CELL_TIMEOUT,
):
    """Run the notebooks `NN_*.ipynb` of `folder` in order, print the progress and a closing table; return an exit code.

    only: beginnings of file names, such as "03"; all notebooks if empty. fast: smaller parameters, outputs to
    `results`/fast instead of back into `folder`. solved: with the exercises solved, outputs to `results`/solved. ledger: the
    JSON file that collects the records of the notebooks that passed (`data/ledger.json`, or one beside the outputs when
    they do not go back into `folder`). timeout: seconds that one cell may take.

    Where outputs cannot be written, as in a read-only checkout, they and their ledger go to the system's temporary directory,
    which is said.

    Exit codes: 0 all passed, 1 a notebook failed, 2 nothing was run (message says why), 128 + signal when interrupted.
    """
    folder = Path(folder)
    outcomes = []
    try:
        notebooks = _select(folder, only)
        target = _target(folder, results, "solved" if solved else "fast" if fast else None)
        ledger = Path(ledger or (ROOT / "data" / "ledger.json" if target == folder else target / "ledger.json"))
        _check(ledger)
        with (
            _alone(folder if files.is_writable(folder) else target),
            _signals_raise(),
            tempfile.TemporaryDirectory() as scratch,
        ):
            partial = [*target.glob(".*.ipynb.partial"), *ledger.parent.glob(f".{ledger.stem}-*.json.partial")]
            for leftover in partial:  # of a run that was killed while writing
                leftover.unlink()
            outcomes += [Outcome(path.stem) for path in notebooks]
            for path, outcome in zip(notebooks, outcomes, strict=True):
                _run_one(path, target / path.name, outcome, (fast, solved), ledger, Path(scratch), timeout)
    except _NothingRun as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        print(f"\nStopped by {signal.Signals(number).name}.", file=sys.stderr)
        _print_table(outcomes)
        return 128 + number
    _print_table(outcomes)
    return 0 if all(outcome.verdict == "ok" for outcome in outcomes) else 1


class _NothingRun(Exception):
    pass


def _target(folder, results, edition):
    """Return where outputs go: back into `folder`, into `results` if they are an `edition`, or where there is room for them."""
    target = folder if edition is None else Path(results) / edition
    with contextlib.suppress(OSError):
        target.mkdir(parents=True, exist_ok=True)
    if files.is_writable(target):
        return target
    instead = files.temporary_dir() / (edition or "notebooks")
    instead.mkdir(exist_ok=True)
    print(f"{target} cannot be written: the notebooks and their ledger go to {instead}.", file=sys.stderr)
    return instead


def _check(ledger):
    try:
        ledgers.read(ledger)  # now, and not when the first notebook has run for minutes
    except ledgers.LedgerError as error:
        raise _NothingRun(f"Nothing was run: {error}.") from None


def _select(folder, only):
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    names = ", ".join(path.stem for path in notebooks)
    if not notebooks:
        raise _NothingRun(f"There are no notebooks named NN_*.ipynb in {folder.name}/.")
    for start in only:
        if not any(path.name.startswith(start) for path in notebooks):
            raise _NothingRun(f"No notebook begins with {start!r}. There are: {names}.")
    return [path for path in notebooks if not only or path.name.startswith(tuple(only))]


@contextlib.contextmanager
def _alone(folder):
    lock = filelock.FileLock(folder / ".run.lock")  # the system frees it with the process, however that ends
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise _NothingRun("Another run of these notebooks is under way; wait for its end, or stop it.") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _signals_raise():
    # Both ways of being stopped unwind through the same `finally` clauses, which end the kernel.
    def stop(number, frame):
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_one(path, target, outcome, edition, ledger, scratch, timeout):
    fast, solved = edition
    records = scratch / f"{path.stem}.json"
    progress = _Progress(outcome)
    started = time.perf_counter()
    outcome.verdict = "interrupted"
    try:
        notebook, parameters = _load(path, fast)
        if solved:
            from course_utils.tools import solve

            solve.solve(notebook)
            verdicts = [cell.outputs[0].text for cell, _ in solve.cells(notebook)]
        environment = _environment(scratch, "fast" if fast else "full", records, ledger)
        executed = _execute(notebook, parameters, path.parent, environment, progress, timeout)
        if solved and [_printed(cell) for cell, _ in solve.cells(executed)] != verdicts:
            raise NotebookError("an exercise is not solved by its solution.")
        _store(executed, target, records, ledger)
        outcome.verdict = "ok"
    except Exception as error:  # whatever it is, the other notebooks still run
        outcome.verdict = f"FAILED {progress.where}".rstrip()
        reason = error if isinstance(error, NotebookError) else traceback.format_exc()
        print(f"\n{path.stem} failed: {reason}\n", file=sys.stderr, flush=True)
    finally:
        outcome.seconds = time.perf_counter() - started


def _store(notebook, target, records, ledger):
    """Replace the notebook and its records in the ledger: both, or where there is no room for one of them, neither."""
    try:
        with files.replacing(target) as partial:
            partial.write_text(to_text(notebook), encoding="utf-8")
            if records.exists():
                ledgers.merge(records, ledger)
    except (OSError, ledgers.LedgerError) as error:
        raise NotebookError(f"its results cannot be written ({error}); notebook and ledger are as they were.") from None


def _load(path, fast):
    """Return the notebook and its papermill parameters.

    Raises `NotebookError` for a file that is no notebook, and when its fast values fit no parameter.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError as error:
        first_line = str(error).partition("\n")[0][:100]
        raise NotebookError(f"{path.name} is no notebook ({first_line}): restore it with git.") from None
    notebook.metadata["kernelspec"] = nbformat.from_dict(KERNELSPEC)
    # Left behind when somebody ran papermill by hand; this run brings its own, or none.
    notebook.cells = [cell for cell in notebook.cells if not _injected(cell)]
    values = notebook.metadata.get("course", {}).get("fast", {}) if fast else {}
    if values and not any("parameters" in cell.metadata.get("tags", ()) for cell in notebook.cells):
        raise NotebookError("its metadata hold fast values, but no cell is tagged `parameters`.")
    stale = sorted(set(values) - set(papermill.inspect_notebook(notebook))) if values else []
    if stale:
        raise NotebookError(f"its metadata hold fast values its `parameters` cell does not assign: {', '.join(stale)}.")
    return notebook, dict(values)


def _printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def _injected(cell):
    return "injected-parameters" in cell.metadata.get("tags", ())


def _environment(scratch, mode, records, base):
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # pictures stay inline
    if not files.is_writable(os.path.expanduser("~")):  # Matplotlib would say so in the first picture's outputs
        environment.setdefault("MPLCONFIGDIR", str(scratch / "matplotlib"))
    return environment | {
        "COURSE_RUN": mode,
        "COURSE_LEDGER": str(records),
        "COURSE_LEDGER_BASE": str(base),
        "CUDA_VISIBLE_DEVICES": "",  # the committed outputs are a processor's
        "IPYTHONDIR": str(scratch / "ipython"),  # no start-up files of the user's
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # or the debugger warns about Python's frozen modules
        "PYTHONHASHSEED": "0",
    }


def _execute(notebook, parameters, folder, environment, progress, timeout):
    """Return the executed, cleaned notebook; raise `NotebookError` for the first cell that fails."""
    # Without any kernel folder the manager falls back on the kernel of the interpreter that runs this very file.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    try:
        run_sync(kernel.start_kernel)(
            cwd=str(folder),
            env=environment,
            extra_arguments=["--HistoryManager.hist_file=:memory:", "--log-level=ERROR"],
        )
        progress.begin(notebook, kernel.provisioner.pid)
        executed = papermill.execute_notebook(
            notebook,
            None,  # papermill itself writes no file
            parameters,
            kernel_name="python3",
            progress_bar=False,
            km=kernel,
            record_timing=False,
            execution_timeout=timeout,
            on_cell_execute=progress.cell_starts,
            on_cell_executed=progress.cell_ends,
        )
    except PapermillExecutionError as error:
        details = str(error).partition('":\n')[2].strip()
        memory = OUT_OF_MEMORY.search(f"{error.ename}: {error.evalue}")
        advice = "\nMemory ran out: close other programs, or take smaller numbers (FAST=1)." if memory else ""
        raise NotebookError(f"{progress.where}: {error.ename}: {error.evalue}{advice}\n\n{details}") from None
    except CellTimeoutError:
        raise NotebookError(f"{progress.where}: TimeoutError: it ran for more than {timeout} s.") from None
    except (DeadKernelError, RuntimeError) as error:
        if run_sync(kernel.is_alive)():
            raise
        raise NotebookError(f"{progress.where or 'start'}: {_death(kernel)}") from error
    finally:
        if kernel.has_kernel:
            run_sync(kernel.shutdown_kernel)(now=True)
    if any(output.output_type == "error" for cell in executed.cells for output in cell.get("outputs", ())):
        raise NotebookError(f"{progress.where}: SystemExit")  # papermill takes exit(0) for success
    return clean(executed)


def _death(kernel):
    code = run_sync(kernel.provisioner.poll)()
    if code is not None and code < 0:
        why = "; the system does that when memory runs out" if code == -9 else ""
        return f"the kernel died: killed by {signal.Signals(-code).name}{why}."
    return f"the kernel died: its process ended with exit code {code}."


class _Progress:
    """Prints a line for each code cell and keeps the highest peak; the hooks are called by nbclient."""

    def __init__(self, outcome):
        self.outcome = outcome
        self.where = ""

    def begin(self, notebook, pid):
        self.total = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
        self.number = 0
        self.memory = _Memory(pid)

    def cell_starts(self, cell, cell_index):
        self.number += not _injected(cell)
        self.where = f"cell {self.number}/{self.total}"
        self.memory.reset_peak()
        self.started = time.perf_counter()

    def cell_ends(self, cell, cell_index, execute_reply):
        seconds = time.perf_counter() - self.started
        peak = self.memory.peak_mib()
        if peak is not None:
            self.outcome.peak = max(peak, self.outcome.peak or 0)
        if _injected(cell):
            return
        print(f"{self.outcome.notebook}  {self.where:>11}  {seconds:6.1f} s  {_mib(peak)} MiB", flush=True)


class _Memory:
    """The peak resident memory of a process, as Linux keeps it; unknown elsewhere."""

    def __init__(self, pid):
        self.process = Path("/proc") / str(pid)

    def reset_peak(self):
        with contextlib.suppress(OSError):  # not Linux, or not allowed in this container: peaks then only ever grow
            (self.process / "clear_refs").write_text("5")

    def peak_mib(self):
        with contextlib.suppress(OSError):
            for line in (self.process / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        return None


def _mib(peak):
    return "    -" if peak is None else f"{peak:5.0f}"


def _print_table(outcomes):
    width = max([len(outcome.notebook) for outcome in outcomes], default=8)
    print(f"\n{'notebook':{width}}  seconds  peak MiB  verdict")
    for outcome in outcomes:
        print(f"{outcome.notebook:{width}}  {outcome.seconds:7.1f}  {_mib(outcome.peak):>8}  {outcome.verdict}")
    print(f"{'total':{width}}  {sum(outcome.seconds for outcome in outcomes):7.1f}", flush=True)


def main(arguments=None):
    """Parse the command line and run; a full run that passed also writes the README's results. Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m course_utils.tools.run", description="Run the course's notebooks.")
    parser.add_argument("--fast", action="store_true", help="smaller parameters; outputs go to results/fast/")
    parser.add_argument("--solved", action="store_true", help="exercises solved; outputs go to results/solved/")
    parser.add_argument("--only", nargs="+", default=[], metavar="NN", help="notebooks that begin with these, e.g. 03")
    options = parser.parse_args(arguments)
    code = run(only=options.only, fast=options.fast, solved=options.solved)
    if code == 0 and not options.fast and not options.solved and files.is_writable(ROOT):
        from course_utils.tools import results

        results.write_readme()
    return code


if __name__ == "__main__":
    sys.exit(main())
