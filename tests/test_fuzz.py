"""Files that are damaged, or lie: each loader reads them or names them in the error that it documents, and asks for no memory.

hypothesis damages a small valid file of each kind: it flips bits, cuts, inserts and moves bytes, and puts other numbers and
other values into headers. What can still be loaded has to work, too. Loading may take some memory and some seconds, no more.

The files tried are the same each time. To look for new ones, a hundred times as many:
`COURSE_FUZZ=100 python -m pytest tests/test_fuzz.py --hypothesis-profile=default`.
"""

import contextlib
import copy
import functools
import gc
import importlib
import json
import math
import operator
import os
import signal
import struct
import sys
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as tensors_of
from safetensors.torch import save_file
from torch import nn

from course_utils import backends, char_lm, data, files, int4, ledger, measure, models, report, simulate, smollm
from course_utils.rounding.awq import InputScale, scale_input
from course_utils.simulate import Policy
from course_utils.stats import Proportion
from course_utils.tools import arms, ladder

progress = importlib.import_module("course_utils.exercises.progress")  # the package has a function of that name

EFFORT = int(os.environ.get("COURSE_FUZZ", 1))
LINUX = sys.platform == "linux"  # only there can a process be held to an amount of memory


# What loading may take ---------------------------------------------------------------------------------------------------


class Endless(BaseException):
    """Loading did not end. Not an `Exception`, so that no loader takes it for damage."""


@contextlib.contextmanager
def bounds(room, seconds):
    """Let what is done here have `room` bytes more than there are, and some seconds of the processor."""
    if not LINUX:
        yield
        return
    import resource

    def stop(*_):
        raise Endless

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + room, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def loads(load, error, names, room=2**30, seconds=30):
    """Return whether `load()` succeeds. Any other exception than an `error` that has one of `names` in it is a failure."""
    try:
        with bounds(room, seconds):
            load()
    except error as caught:
        assert type(caught) is error and any(name in str(caught) for name in names), caught
        while caught is not None:
            asked = isinstance(caught, MemoryError) or "allocate" in str(caught)
            assert not asked, f"it asked for memory: {caught}"
            caught = caught.__context__
        return False
    return True


@dataclass(frozen=True)
class Damaged:
    """The content of a file after `edits`."""

    edits: list
    content: bytes = field(repr=False)


def fuzz(path, damages, load, error, *, examples, names=()):
    """Load `path` after each of `examples` damages; return how many could be loaded (True) and could not (False)."""
    load()  # undamaged, and libraries that it needs are here afterwards
    outcomes = Counter()

    @settings(max_examples=EFFORT * examples, deadline=None)
    @given(damaged=damages)
    @example(damaged=Damaged(["empty"], b""))
    @example(damaged=Damaged(["nested"], b"[" * 100_000))
    def search(damaged):
        path.write_bytes(damaged.content)
        files._sha256_of_version.cache_clear()  # it goes by the time of a file, and many of these are written within a tick
        outcomes[loads(load, error, names or (path.name,))] += 1

    search()
    return outcomes


@pytest.mark.skipif(not LINUX, reason="only Linux holds a process to an amount of memory")
@pytest.mark.parametrize("ask", [lambda: bytearray(2**40), lambda: torch.empty(2**40)], ids=["Python", "torch"])
def test_loaders_that_ask_for_a_lot_of_memory_are_noticed(ask):
    def caught():
        try:
            ask()
        except (MemoryError, RuntimeError) as error:
            raise ValueError("file.json is damaged") from error

    with pytest.raises(AssertionError, match="asked for memory"):
        loads(caught, ValueError, ("file.json",))


@pytest.mark.skipif(not LINUX, reason="only Linux holds a process to an amount of memory")
def test_loaders_that_never_end_are_noticed():
    def endless():
        with contextlib.suppress(Exception):
            while True:
                pass

    with pytest.raises(Endless):
        loads(endless, ValueError, (), seconds=0.1)


@pytest.mark.parametrize("said", [KeyError("file.json"), ValueError("it is damaged"), UnicodeError("file.json")])
def test_other_errors_and_nameless_ones_are_noticed(said):
    def load():
        raise said

    with pytest.raises((AssertionError, KeyError)):
        loads(load, ValueError, ("file.json",))


# Damage ------------------------------------------------------------------------------------------------------------------


def flip(content, place, bit):
    content[place : place + 1] = bytes(byte ^ 1 << bit for byte in content[place : place + 1])


def cut(content, place):
    del content[place:]


def remove(content, place, n):
    del content[place : place + n]


def put(content, place, some):
    content[place:place] = some


def move(content, place, source, n):
    content[place : place + n] = content[source : source + n]


def lie(content, place, number):
    content[place : place + len(number)] = number


LIES = [struct.pack("<I", n) for n in (*range(14), 2**31, 2**32 - 1)]
LIES += [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32, 2**40, 2**60, 2**63 - 1, 2**64 - 1)]


def in_bytes(content, header=64):
    """Damage anywhere, more of it in the first `header` bytes, or at those places of a list."""
    listed = isinstance(header, list)
    place = st.sampled_from(header) if listed else st.integers(0, header)
    place, n = place | st.integers(0, len(content)), st.integers(1, 40)
    edit = st.one_of(
        st.tuples(st.just(flip), place, st.integers(0, 7)),
        st.tuples(st.just(cut), place),
        st.tuples(st.just(remove), place, n),
        st.tuples(st.just(put), place, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just(move), place, place, n),
        st.tuples(st.just(lie), place, st.sampled_from(LIES)),
    )

    def apply(edits):
        damaged = bytearray(content)
        for change, *arguments in edits:
            change(damaged, *arguments)
        return Damaged(edits, bytes(damaged))

    return st.lists(edit, min_size=1, max_size=3).map(apply)


GONE, NESTED = "(gone)", "(nested)"
VALUES = st.sampled_from(
    [None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**18, 10**400, 0.5, 4.0, 1e308, math.inf, math.nan]
    + ["", "x", "8", "\ud800", [], {}, [[]], [1, 2], [0, 10**12], {"x": 1}, {"x": {"y": {}}}, GONE, NESTED]
)
VALUES = VALUES | st.integers() | st.text(max_size=3)


def places(value):
    """Yield the path of each value in a JSON value."""
    yield ()
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from ((key, *path) for path in places(part))


def in_json(value):
    """Lists of other values at places of `value`, as `with_edits` takes them."""
    return st.lists(st.tuples(st.sampled_from(list(places(value))), VALUES), min_size=1, max_size=2)


def with_edits(value, edits):
    holder = {"": copy.deepcopy(value)}
    for path, other in edits:
        *way, last = "", *path
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier edit took the place away
            parent = functools.reduce(operator.getitem, way, holder)
            parent[last] = copy.deepcopy(other)
            if other == GONE:
                del parent[last]
    return holder.get("")


def as_json(value):
    return json.dumps(value).replace(json.dumps(NESTED), "[" * 100_000 + "]" * 100_000)


def in_json_file(content):
    value = json.loads(content)
    edited = in_json(value).map(lambda edits: Damaged(edits, as_json(with_edits(value, edits)).encode()))
    return edited | in_bytes(content)


def header_of(content):
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(content, header):
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + content[8 + int.from_bytes(content[:8], "little") :]


def in_safetensors(content, key=None):
    """Damage to a safetensors file: its bytes, the header that says where tensors are, and the JSON in its metadata."""
    header = header_of(content)
    where = int.from_bytes(content[:8], "little") + 8
    strategies = [in_bytes(content, 9), in_bytes(content, where)]
    strategies.append(
        in_json(header).map(lambda edits: Damaged(edits, with_header(content, as_json(with_edits(header, edits)))))
    )
    if key is not None:
        stored = json.loads(header["__metadata__"][key])

        def in_metadata(edits):
            metadata = header["__metadata__"] | {key: as_json(with_edits(stored, edits))}
            return Damaged(edits, with_header(content, json.dumps(header | {"__metadata__": metadata})))

        strategies.append(in_json(stored).map(in_metadata))
    return st.one_of(strategies)


def sealed(facts, tensors, path):
    """Return the content of a file whose checksum is right."""
    if isinstance(facts, dict):
        facts.pop("sha256", None)
        facts["sha256"] = files._checksum(facts, tensors)
    save_file(tensors, path, metadata={"course": as_json(facts)})
    return path.read_bytes()


CHANGES = {
    "gone": lambda tensor: None,
    "flat": lambda tensor: tensor.reshape(-1),
    "one": lambda tensor: tensor.reshape(-1)[:1],
    "none": lambda tensor: tensor.reshape(-1)[:0],
    "twice": lambda tensor: torch.cat([tensor.reshape(-1)] * 2),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "int8": lambda tensor: tensor.to(torch.int8),
    "nan": lambda tensor: torch.full(tensor.shape, math.nan),
}


def in_sealed(content, path):
    """Damage that no checksum finds, for it was there before: what a file says of its tensors is not taken on trust."""
    facts, tensors = json.loads(header_of(content)["__metadata__"]["course"]), tensors_of(content)

    def of_tensors(changes):
        changed = dict(tensors)
        for key, name in changes:
            if (tensor := CHANGES[name](changed.pop(key, tensors[key]))) is not None:
                changed[key] = tensor.clone()
        return Damaged(changes, sealed(dict(facts), changed, path))

    def of_facts(edits):
        return Damaged(edits, sealed(with_edits(facts, edits), tensors, path))

    change = st.tuples(st.sampled_from(sorted(tensors)), st.sampled_from(sorted(CHANGES)))
    return in_json(facts).map(of_facts) | st.lists(change, min_size=1, max_size=2).map(of_tensors)


# Networks ----------------------------------------------------------------------------------------------------------------

TOKENS = torch.arange(16).reshape(2, 8)


@pytest.fixture
def small_char_lm(monkeypatch):
    """Let the language model be a small one of the same kind."""
    small = functools.partial(char_lm.CharLM, context=8, width=32, heads=2, blocks=1)
    monkeypatch.setattr(char_lm, "CharLM", small)


@pytest.fixture
def packed(tmp_path, small_char_lm):
    """A packed file with all that there can be in one: groups, zero points, scaled inputs, ranges of activations."""
    torch.manual_seed(0)
    model = models.load("char_lm", weights=None)
    scale_input(model.blocks[0].up, InputScale(torch.full((32,), 2.0), -1))
    policy = Policy(weights=4, activations=8, granularity=32, symmetric=False)
    path = tmp_path / "packed.safetensors"
    int4.save_packed(simulate.quantize(model, policy, [TOKENS]), path)
    return path


@torch.no_grad()
def run_packed(path):
    assert int4.load_packed(path)(TOKENS).shape == (2, 8, char_lm.SYMBOLS)


def test_packed_files(packed):
    damages = in_safetensors(packed.read_bytes(), "course")
    outcomes = fuzz(packed, damages, lambda: run_packed(packed), ValueError, examples=60)
    assert outcomes[False]


def test_packed_files_with_a_right_checksum(packed, tmp_path):
    damages = in_sealed(packed.read_bytes(), tmp_path / "sealed")
    outcomes = fuzz(packed, damages, lambda: run_packed(packed), ValueError, examples=120)
    assert outcomes[True] and outcomes[False]


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


@pytest.fixture
def int8(tmp_path, monkeypatch):
    """A file of a small network with a convolution and a linear layer in INT8."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # most of the time that it takes to make a network
    path = tmp_path / "int8.safetensors"
    backends.save(backends.quantize_static(small_cnn(), [IMAGES]), path)
    return path


@torch.no_grad()
def run_int8(path):
    assert backends.load(path, model=small_cnn())(IMAGES).shape == (2, 3)


def test_int8_files(int8):
    damages = in_safetensors(int8.read_bytes(), "course")
    outcomes = fuzz(int8, damages, lambda: run_int8(int8), ValueError, examples=60)
    assert outcomes[False]


def test_int8_files_with_a_right_checksum(int8, tmp_path):
    damages = in_sealed(int8.read_bytes(), tmp_path / "sealed")
    outcomes = fuzz(int8, damages, lambda: run_int8(int8), ValueError, examples=50)
    assert outcomes[False]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with a small checkpoint and a manifest that has it, and the two that rungs and arms are of."""
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    others = {models.checkpoint(name): {"bytes": 1, "sha256": f"sum of {name}"} for name in models.NAMES}
    (tmp_path / files.MANIFEST).write_text(json.dumps(others))
    return tmp_path


@pytest.fixture
def checkpoint(folder, small_char_lm):
    path = folder / models.checkpoint("char_lm")
    path.parent.mkdir()
    stored = models.load("char_lm", weights=None).state_dict()
    save_file({key: value.half() for key, value in stored.items()}, path)
    files.update_manifest(models.checkpoint("char_lm"))
    return path


def test_checkpoints(checkpoint):
    damages = in_safetensors(checkpoint.read_bytes())
    outcomes = fuzz(checkpoint, damages, lambda: models.load("char_lm"), files.DataFileError, examples=40)
    assert outcomes[False]


def test_checkpoints_that_the_manifest_agrees_with(checkpoint):
    def load():
        files.update_manifest(models.checkpoint("char_lm"))
        with torch.no_grad():
            models.load("char_lm")(TOKENS)

    outcomes = fuzz(checkpoint, in_safetensors(checkpoint.read_bytes()), load, files.DataFileError, examples=40)
    assert outcomes[True] and outcomes[False]


# Records -----------------------------------------------------------------------------------------------------------------


def test_the_manifest(folder):
    (folder / "letters.txt").write_text("abcdef")
    files.update_manifest("letters.txt", licence="MIT")
    manifest = folder / files.MANIFEST
    outcomes = fuzz(
        manifest,
        in_json_file(manifest.read_bytes()),
        lambda: files.verified("letters.txt"),
        files.DataFileError,
        examples=150,
        names=(files.MANIFEST, "letters.txt"),
    )
    assert outcomes[True] and outcomes[False]


def test_the_ledger(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    monkeypatch.setenv("COURSE_LEDGER", str(path))
    monkeypatch.setenv("COURSE_LEDGER_BASE", str(path))
    ledger.record("FP32", "latency", 26.9, unit="ms", low=26.1, high=27.5, n=30)
    ledger.record("FP32", "size", 44_775_880, unit="bytes")
    ledger.record("FP32", "accuracy", Proportion(94, 100))
    ledger.record("INT8", "speed-up", 4.5, unit="×", source="cited")

    def load():
        str(ledger.table(["FP32", "INT8"], ["latency", "size", "accuracy", "speed-up"]))
        ledger.merge(path, tmp_path / "others.json")
        (tmp_path / "others.json").unlink()

    outcomes = fuzz(path, in_json_file(path.read_bytes()), load, ledger.LedgerError, examples=150)
    assert outcomes[True] and outcomes[False]


def test_progress(tmp_path, monkeypatch):
    monkeypatch.delenv("COURSE_RUN", raising=False)
    path = tmp_path / "progress.json"  # the one that conftest names
    progress.note("zero-point", True)
    progress.note("per-channel", False)

    outcomes = fuzz(path, in_json_file(path.read_bytes()), progress.read, files.DataFileError, examples=150)
    assert outcomes[True] and outcomes[False]


def test_reports(tmp_path):
    content = report.stored()[report.REFERENCE]
    content |= {"layers": content["layers"][:2], "ladder": content["ladder"][:2]}
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(content), encoding="utf-8")

    def load():
        found = report.read(path)
        report.as_roofline(found)
        report.markdown(found, {"ladder": "", "roofline": ""}).encode()
        report.compare({"mine": content, "theirs": found}).encode()

    outcomes = fuzz(path, in_json_file(path.read_bytes()), load, report.ReportError, examples=150)
    assert outcomes[True] and outcomes[False]


def test_the_ladder(folder):
    counts = measure.Comparison(100, Proportion(95, 100), Proportion(90, 100), flips=7, fixed=1, broke=6)
    policies = Policy(weights=4), Policy(weights=4, granularity=32, layers={"fc": 8})
    ladder._add([ladder.Rung("resnet18", policy, "nearest", "validation", counts) for policy in policies])
    path = folder / ladder.FILE

    def load():
        for rung in ladder.read():
            f"{rung.policy} {rung.comparison}"

    outcomes = fuzz(path, in_json_file(path.read_bytes()), load, files.DataFileError, examples=200)
    assert outcomes[True] and outcomes[False]


def test_the_arms(folder):
    ptq = arms.Arm("resnet18", arms.PTQ, Policy(weights=4, layers={"fc": 8}))
    trained = arms.Arm("mobilenet_v2", arms.QAT, arms.W4A8, 10, 2, "validation")
    arms._write({arm: torch.arange(20) % 10 for arm in (ptq, trained)})
    path = folder / arms.FILE

    def load():
        for arm, classes in arms.read().items():
            f"{arm.policy} {classes.bincount()}"

    outcomes = fuzz(path, in_safetensors(path.read_bytes(), "arms"), load, files.DataFileError, examples=200)
    assert outcomes[True] and outcomes[False]


def read_images():
    data._splits.cache_clear()
    return data.fashion_mnist("validation").pixels


@pytest.mark.parametrize("agreed", [False, True], ids=["as they were", "as the manifest has them"])
def test_images(tiny_data, agreed):
    name = f"{data.FOLDER}/{data.IDX_FILES[1]}.gz"
    path, facts = tiny_data / name, files.read_manifest()[name]

    def load():
        if agreed:
            files.update_manifest(name, unpacked_sha256=facts["unpacked_sha256"])
        (tiny_data / data.FOLDER / data.IDX_FILES[1]).unlink(missing_ok=True)
        read_images()

    outcomes = fuzz(path, in_bytes(path.read_bytes()), load, files.DataFileError, examples=40)
    assert outcomes[False]


def test_unpacked_images_that_are_damaged_are_unpacked_again(tiny_data):
    before, path = read_images(), tiny_data / data.FOLDER / data.IDX_FILES[0]

    def load():
        assert torch.equal(read_images(), before)

    outcomes = fuzz(path, in_bytes(path.read_bytes()), load, files.DataFileError, examples=30)
    assert outcomes[True] and not outcomes[False]


# GGUF --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path):
    """A Llama of one block as GGUF, with Q4_1 and float32 weights."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "llama.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_feed_forward_length(32)
    writer.add_vocab_size(5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(16)
    writer.add_token_list(["a", "b", "c", "Ġ", "ab"])
    writer.add_token_types([1] * 5)
    writer.add_token_merges(["a b"])
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (5, 32), "output_norm": (32,)}
    block = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    block |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in block.items()}).items():
        w = torch.randn(*shape, generator=generator).numpy()
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces(path):
    """Return where each number and string of a GGUF header starts: fields and descriptions of tensors."""
    reader = smollm.read(path)
    found = []
    for part in (*reader.fields.values(), *(tensor.field for tensor in reader.tensors)):
        place = part.offset
        for piece in part.parts:
            found.append(place)
            place += piece.nbytes
    return found


def run_llama(path):
    model, tokenizer = smollm.load(path)
    assert isinstance(tokenizer.decode(smollm.generate(model, torch.tensor([0]), 2)), str)


def test_gguf_files(llama):
    damages = in_bytes(llama.read_bytes(), pieces(llama))
    outcomes = fuzz(llama, damages, lambda: run_llama(llama), ValueError, examples=250)
    assert outcomes[True] and outcomes[False]


# Headers that promise terabytes ------------------------------------------------------------------------------------------

TERABYTES = {"name": "resnet18", "num_classes": 10**10}


def in_256_mib(load, path):
    models.build("mobilenet_v2")  # so that libraries are here already, which need more
    return loads(load, ValueError, (path.name,), room=2**28)


@pytest.mark.parametrize(
    ("where", "promise", "read"),
    [
        (("architecture",), TERABYTES, False),
        (("layers", "head", "shape"), [10**6, 10**7], False),
        (("layers", "head", "bits"), 10**12, False),
        (("layers", "head", "group_size"), 10**12, True),  # a group longer than a row is no lie
    ],
)
def test_packed_files_that_promise_terabytes(packed, where, promise, read):
    content = packed.read_bytes()
    layout = with_edits(json.loads(header_of(content)["__metadata__"]["course"]), [(where, promise)])
    sealed(layout, tensors_of(content), packed)
    assert in_256_mib(lambda: run_packed(packed), packed) is read


@pytest.mark.parametrize("shape", [[2**42], [2**21, 2**21], [2**62, 4]])
def test_safetensors_that_promise_terabytes(packed, int8, shape):
    for path, run in ((packed, run_packed), (int8, run_int8)):
        content = path.read_bytes()
        header = header_of(content)
        key = next(key for key in header if key != "__metadata__")
        header[key] |= {"shape": shape, "data_offsets": [0, math.prod(shape)], "dtype": "U8"}
        for lying in (with_header(content, json.dumps(header)), struct.pack("<Q", shape[0]) + content[8:]):
            path.write_bytes(lying)
            assert not in_256_mib(functools.partial(run, path), path)


@pytest.mark.parametrize(
    "edits",
    [
        [(("recipe", "architecture"), TERABYTES)],
        [(("rest", "image_shape"), [3, 10**6, 10**6])],
        [(("recipe", "engine"), "pt2e"), (("rest", "image_shape"), [3, 10**6, 10**6])],
    ],
)
def test_int8_files_that_promise_terabytes(int8, edits):
    content = int8.read_bytes()
    facts, tensors = json.loads(header_of(content)["__metadata__"]["course"]), tensors_of(content)
    sealed(with_edits(facts, edits), tensors, int8)
    assert not in_256_mib(lambda: backends.load(int8), int8)


def test_an_image_that_no_file_may_ask_for_is_not_saved(int8, tmp_path, monkeypatch):
    """What could not be loaded again is refused while there still is a model."""
    model = backends.load(int8, model=small_cnn())
    monkeypatch.setattr(backends, "_able", lambda *_: SimpleNamespace(flatten=lambda _: ({}, {"image_shape": [2**25]})))
    with pytest.raises(ValueError, match="large is for images of shape"):
        backends.save(model, tmp_path / "large")
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(
    ("field", "part", "form", "numbers"),
    [
        ("GGUF.tensor_count", 0, "<Q", (2**60,)),
        ("GGUF.kv_count", 0, "<Q", (2**60,)),
        ("llama.block_count", 3, "<I", (2**31,)),
        ("llama.embedding_length", 3, "<I", (2**32 - 1,)),
        ("llama.feed_forward_length", 3, "<I", (2**32 - 1,)),
        ("llama.vocab_size", 3, "<I", (2**32 - 1,)),
        ("llama.rope.dimension_count", 3, "<I", (2**32 - 2,)),
        ("general.architecture", 3, "<Q", (2**40,)),  # its length
        ("tokenizer.ggml.tokens", 4, "<Q", (2**60,)),
        ("tokenizer.ggml.token_type", 4, "<Q", (2**60,)),
        ("token_embd.weight", 3, "<QQ", (32, 2**40)),  # its shape
        ("token_embd.weight", 3, "<QQ", (2**32, 2**32)),
        ("token_embd.weight", 2, "<I", (2**31,)),  # its dimensions
    ],
)
def test_gguf_files_that_promise_terabytes(llama, field, part, form, numbers):
    reader = smollm.read(llama)
    described = reader.fields | {tensor.name: tensor.field for tensor in reader.tensors}
    place = described[field].offset + sum(piece.nbytes for piece in described[field].parts[:part])
    content = bytearray(llama.read_bytes())
    lie(content, place, struct.pack(form, *numbers))
    llama.write_bytes(content)
    assert not in_256_mib(lambda: run_llama(llama), llama)


def test_a_gguf_list_that_eats_its_file_is_refused_early(tmp_path, monkeypatch):
    """Each byte of a list becomes an object of hundreds, so that a long file could fill the memory all the same."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(smollm, "PIECES", 1000)
    path = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("long", [1] * 1000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="long.gguf .*more than 1,000 pieces"):
        smollm.read(path)
    monkeypatch.setattr(smollm, "PIECES", 1100)
    assert smollm.read(path).fields["long"].contents() == [1] * 1000
