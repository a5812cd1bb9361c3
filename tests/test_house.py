"""The rules of the house that a machine can check: who imports whom, public names, nothing unpickled, no own paths."""

import ast
import importlib
import inspect
import operator
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guards import MACHINE_PATH

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "course_utils"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ENGINES = ("torch.ao", "torchao", "onnx", "onnxruntime", "openvino", "nncf", "executorch", "tensorrt")
ARITHMETIC = (
    *("formats", "affine", "observers", "integer", "rounding", "weights", "int4", "simulate", "qat"),
    *("stats", "tables"),
)
ABOVE = (
    *("backends", "measure", "timing", "child", "profiling", "energy", "isa", "roofline", "ledger", "kernels"),
    *("plots", "widgets", "exercises", "tools", "training"),
)
PUBLIC = {
    "data": ["fashion_mnist(split, *, size=64)", "batches(dataset, batch_size, *, limit=None)"],
    "models": ["load(name, *, weights='course')"],
    "affine": [
        "QParams(scale, zero_point, qmin, qmax, axis=None, group_size=None)",
        "choose_qparams(x, *, bits=8, symmetric=False, axis=None, group_size=None, signed=None)",
        "quantize(x, qparams)",
        "dequantize(q, qparams)",
        "fake_quantize(x, qparams)",
    ],
    "formats": [
        f"{name}.{method}"
        for name in ("FP32", "FP16", "BF16", "FP8_E4M3", "FP8_E5M2", "INT8", "INT4", "FP4_E2M1", "NF4")
        for method in ("encode(x)", "decode(codes)")
    ],
    "observers": ["MinMax()", "MovingAverage()", "Percentile()", "MSE()", "Entropy()"],
    "integer": [
        "quantize_multiplier(real)",
        "requantize(acc, m0, shift, zero_point, qmin, qmax)",
        "linear(q, weight, bias, *, zero_point, m0, shift, out_zero_point)",
        "conv2d(q, weight, bias, *, zero_point, m0, shift, out_zero_point)",
        "add(a, b, *, zero_points, multipliers, out_zero_point)",
        "IntegerModel(quantized_model)",
    ],
    "int4": [
        "pack(q, bits=4)",
        "unpack(packed, shape, bits=4)",
        "quantize_groupwise(w, *, bits=4, group_size=32, symmetric=True)",
        "save_packed(model, path, *, bits=4)",
        "load_packed(path)",
    ],
    "rounding": [
        "bias_correction(model, quantized, batches)",
        "cross_layer_equalization(model)",
        "adaround(model, policy, batches, *, seed=0)",
        "gptq(model, policy, batches)",
        "awq(model, policy, batches)",
    ],
    "simulate": [
        "Policy(weights=8, activations=None, granularity='channel')",
        "quantize(model, policy, calibration=None)",
        "size(model, policy)",
    ],
    "backends": [
        "quantize_dynamic(model)",
        "quantize_static(model, calibration, *, engine=..., per_channel=True, observer=...)",
        "prepare_qat(model)",
        "convert_qat(model)",
        "quantize_weight_only(model, *, bits=4, group_size=128)",
        "save(model, path)",
        "load(path)",
        "engines()",
    ],
    "measure": [
        "accuracy(model, batches)",
        "compare(first, second, batches)",
        "latency(contenders)",
        "size_on_disk(model)",
        "peak_memory(fn)",
        "energy(fn)",
        "machine()",
    ],
    "ledger": [
        "record(subject, quantity, value)",
        "claim(text, holds, *, measured=None)",
        "table(subjects, quantities)",
    ],
    "exercises": ["check(id, answer)", "hint(id)", "solution(id)", "quiz(id)", "progress()"],
    "widgets": [
        "NumberBits(number=0.15625)",
        "ClipRange(x, *, title='the tensor')",
        "FilterError(weight, *, title='filters')",
        "CalibrationSet(results)",
        "Predictions(model, images)",
        "WrittenText(texts, losses=None)",
        "Roofline(ceilings, work, milliseconds=None)",
    ],
}


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Yield the dotted names a module imports, at its top or within functions, relative ones resolved."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ao":
            yield "torch.ao"  # `import torch` is enough to use it


def own_imports(path):
    """The modules of the course that a module of the course imports."""
    modules = {dotted(p) for p in SOURCES}
    return {name for name in imported(path) if name in modules and name != dotted(path)} - {"course_utils"}


@pytest.mark.parametrize("path", [p for p in SOURCES if "backends" not in p.parts], ids=dotted)
def test_only_backends_import_engines(path):
    found = [name for name in imported(path) if any(name == e or name.startswith(f"{e}.") for e in ENGINES)]
    assert not found


def test_arithmetic_reaches_no_backend_and_nothing_that_is_shown_or_measured():
    graph = {dotted(path): own_imports(path) for path in SOURCES}
    for module in ARITHMETIC:
        reached, ahead = set(), {f"course_utils.{module}"} & graph.keys()
        while ahead:
            reached |= ahead
            ahead = set().union(*(graph[name] for name in ahead)) - reached
        above = [name for name in reached if name.split(".")[1] in ABOVE]
        assert not above, f"{module} reaches {above}"


def test_imports_go_one_way():
    graph = {dotted(path): own_imports(path) for path in SOURCES}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def test_tools_are_imported_by_nobody():
    for path in SOURCES:
        if "tools" not in path.parts:
            assert not [name for name in imported(path) if name.startswith("course_utils.tools")], path.name


def test_importing_the_course_is_quick_and_brings_no_heavy_package():
    parts = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "plots", "widgets"))
    program = (
        "import sys, time, torch\n"
        "began = time.perf_counter()\n"
        f"import course_utils; from course_utils import backends, {', '.join(parts)}\n"
        "print(time.perf_counter() - began)\n"
        "print([name for name in ('torchvision', 'matplotlib', 'IPython', 'safetensors.torch') if name in sys.modules])"
    )
    for _ in range(3):  # a busy machine gets three tries
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, heavy = run.stdout.splitlines()
        assert heavy == "[]"
        if float(seconds) <= 0.3:
            return
    pytest.fail(f"importing every module took {seconds} s beyond torch, at most 0.3 allowed")


@pytest.mark.parametrize(("module", "expected"), [(m, e) for m, names in PUBLIC.items() for e in names])
def test_public_names_keep_their_signatures(module, expected):
    name = expected.split("(")[0]
    wanted = inspect.signature(eval(f"lambda {expected[len(name) + 1 : -1]}: None")).parameters
    found = operator.attrgetter(name)(importlib.import_module(f"course_utils.{module}"))
    found = inspect.signature(found).parameters
    leading = [p.name for p in wanted.values() if p.kind is not p.KEYWORD_ONLY]
    assert list(found)[: len(leading)] == leading
    for parameter in wanted.values():
        assert parameter.name in found
        if parameter.default is ...:
            assert found[parameter.name].default is not inspect.Parameter.empty
        else:
            assert found[parameter.name].default == parameter.default
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    added = [p for p in found.values() if p.name not in wanted and p.kind not in optional]
    assert all(p.default is not inspect.Parameter.empty for p in added), "what is added must be optional"


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_nothing_is_unpickled_or_evaluated(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec"), ast.unparse(node)
        if called in ("torch.load", "torch.hub.load_state_dict_from_url"):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert options.get("weights_only") == "True", ast.unparse(node)


def test_no_text_of_the_project_names_a_place_on_somebodys_machine():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        planted = name == "tests/test_gate.py"  # to see that the guard of the notebooks finds them
        if planted or not path.is_file() or path.suffix in (".gz", ".safetensors", ".png"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)
