"""The processor's facts, read from /proc/cpuinfo as x86 and ARM write it, and guessed elsewhere."""

import sys
import types

import pytest

from course_utils import cpu
from course_utils.tools import small

X86 = "processor\t: 0\nmodel name\t: A Xeon\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nBogoMIPS\t: 48.00\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0c\n"


@pytest.fixture
def cpuinfo(monkeypatch):
    def give(text):
        def read_text(path):
            if text is None:
                raise FileNotFoundError
            return text

        monkeypatch.setattr(cpu.Path, "read_text", read_text)

    return give


def test_x86(cpuinfo):
    cpuinfo(X86)
    assert cpu.name() == "A Xeon"
    cpuinfo(X86.replace("A Xeon", "An EPYC"))
    assert cpu.name() == "An EPYC"
    assert cpu.flags() == {"fpu", "avx2", "avx512f", "avx512_vnni"}
    assert cpu.has_vnni()


@pytest.mark.parametrize(
    "variable, limit, flags, expected",
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "avx2 avx512_vnni avx_vnni", False),
        ("DNNL_MAX_CPU_ISA", "avx512_core", "avx2 avx512_vnni", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI", "avx2 avx512_vnni", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI", "avx2 avx_vnni", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", "avx2 avx512_vnni", True),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", "avx2 avx512_vnni", True),
        ("ONEDNN_MAX_CPU_ISA", "ALL", "avx2", False),
    ],
)
def test_vnni_counts_only_where_onednn_may_use_it(monkeypatch, variable, limit, flags, expected):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu, "flags", lambda: set(flags.split()))
    monkeypatch.setenv(variable, limit)
    assert cpu.has_vnni() is expected


def test_arm(cpuinfo):
    cpuinfo(ARM)
    assert cpu.name() == "0xd0c"
    assert cpu.flags() == {"fp", "asimd", "asimddp"}
    assert not cpu.has_vnni()


def test_mac(cpuinfo, monkeypatch):
    cpuinfo(None)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(cpu.platform, "system", lambda: "Darwin")
    assert cpu.flags() == {"asimd", "asimddp"}
    assert cpu.name()


def test_elsewhere_torch_knows_the_coarse_capability(cpuinfo, monkeypatch):
    torch = pytest.importorskip("torch")
    cpuinfo(None)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert cpu.flags() == {"avx2"}


def test_container_limit_counts(cpuinfo):
    cpuinfo(str(2**30))
    assert cpu.memory_gib() == 1.0
    cpuinfo("max\n")
    assert cpu.memory_gib() > 1.0


def test_the_last_level_caches_of_our_cores_are_added(tmp_path, monkeypatch):
    def cache(core, index, level, size, shared):
        folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{value}\n")

    monkeypatch.setattr(cpu, "CORES", tmp_path)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert cpu.last_level_cache() is None
    for core, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3"), (4, "4")):
        cache(core, 0, 1, "32K", core)
        cache(core, 1, 3, "16384K", shared)
    assert cpu.last_level_cache() == 2 * 16 * 2**20


@pytest.mark.parametrize(("machine", "x86"), [("x86_64", True), ("AMD64", True), ("arm64", False), ("aarch64", False)])
def test_what_is_x86(machine, x86, monkeypatch):
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    assert cpu.is_x86() is x86


def test_the_cores_are_those_that_this_process_may_run_on(monkeypatch):
    assert cpu.cores() >= 1
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert cpu.cores() == 3
    monkeypatch.delattr(cpu.os, "sched_getaffinity")
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: 7)
    assert cpu.cores() == 7


def test_memory_that_was_freed_is_given_back(monkeypatch):
    called = []
    library = types.SimpleNamespace(malloc_trim=called.append)
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(cpu.gc, "collect", lambda: called.append("collect"))
    cpu.trim_memory()
    assert called == ["collect", 0]
    for missing in (lambda name: types.SimpleNamespace(), lambda name: open("/no/such/library")):
        monkeypatch.setattr(cpu.ctypes, "CDLL", missing)
        cpu.trim_memory()  # of another C library nothing is asked
    assert called == ["collect", 0, "collect", "collect"]


def test_this_machine():
    assert sys.platform != "linux" or cpu.memory_gib() > 0


def test_memory_is_trimmed_after_each_cell_of_a_notebook_and_once_however_often_it_is_asked_for(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    trimmed, frozen = [], []
    monkeypatch.setattr(cpu, "trim_memory", lambda: trimmed.append(1))
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(1))
    cpu.trim_after_each_cell()  # no notebook yet: nothing happens
    shell = InteractiveShell.instance()
    try:
        shell.run_cell("from course_utils import cpu; cpu.trim_after_each_cell(); cpu.trim_after_each_cell()")
        trimmed.clear()
        shell.run_cell("1 + 1")
        shell.run_cell("raise ValueError")
    finally:
        InteractiveShell.clear_instance()
    assert len(trimmed) == 2 and len(frozen) == 1


@pytest.mark.parametrize(
    ("flags", "expected"), [({"avx2", "avx512f"}, False), ({"avx512_bf16"}, True), ({"bf16"}, True)]
)
def test_bf16_arithmetic_is_told_by_the_flags(flags, expected, monkeypatch):
    monkeypatch.setattr(cpu, "flags", lambda: flags)
    assert cpu.has_bf16() == expected


def test_the_limit_of_a_group_of_ours_counts():
    try:
        with small.limited():
            pass
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    code = "import sys; from course_utils import cpu; sys.exit(int(10 * cpu.memory_gib()))"
    assert small.main([sys.executable, "-c", code]) == 10 * small.LIMIT // 2**30
