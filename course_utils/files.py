"""Files that are whole or absent: checked against the manifest when read, replaced in one step when written."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

MANIFEST = "manifest.json"
FOLDER = "squeeze-and-speed-up"  # of this course, beside those of other programs
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))  # the disk, or what we may have of it


class DataFileError(RuntimeError):
    """A committed file is missing, truncated or altered; the message says which one and how to restore it."""


def data_dir():
    """Return the course's `data/` folder: `$COURSE_DATA` if set, else the one of this checkout.

    Raises `DataFileError` when neither holds a manifest, for example in a package installed without its checkout.
    """
    candidates = [Path(p) for p in (os.environ.get("COURSE_DATA"),) if p]
    if not candidates:
        here = Path.cwd()
        candidates = [p / "data" for p in (Path(__file__).resolve().parents[1], here, *here.parents)]
    for folder in candidates:
        if (folder / MANIFEST).is_file():
            return folder
    raise DataFileError(
        f"No {MANIFEST} in {candidates[0]}. The course's data live in the `data/` folder of its repository: "
        "run from a clone of it, or set COURSE_DATA to that folder."
    )


def read_manifest():
    """Return `data/manifest.json` as a dict: file name relative to `data/` → facts about it (bytes, sha256, ...)."""
    path = data_dir() / MANIFEST
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
            raise ValueError("files with their sizes and checksums were expected")
        return entries
    except (ValueError, RecursionError) as error:
        raise DataFileError(f"{path} is not valid ({error}). {restore(MANIFEST)}") from None


def _is_entry(entry):
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


def update_manifest(name, **facts):
    """Set the entry of `name` to its measured `bytes` and `sha256` plus `facts`; the manifest is replaced in one step."""
    path = data_dir() / name
    entries = read_manifest()
    entries[name] = {"bytes": path.stat().st_size, "sha256": sha256(path), **facts}
    write_text(data_dir() / MANIFEST, json.dumps(dict(sorted(entries.items())), indent=2, ensure_ascii=False) + "\n")


def verified(name):
    """Return the path of the data file `name` after checking its size and sha256 against the manifest.

    Raises `DataFileError` naming the file, what was expected and how to restore it.
    """
    entry = read_manifest().get(name)
    path = data_dir() / name
    if entry is None:
        raise DataFileError(f"{name} has no entry in {MANIFEST}. {restore(MANIFEST)}")
    if not path.is_file():
        raise DataFileError(f"{path} is missing (expected {entry['bytes']:,} bytes). {restore(name)}")
    stat = path.stat()
    if stat.st_size != entry["bytes"]:
        raise DataFileError(f"{path} has {stat.st_size:,} bytes, expected {entry['bytes']:,}. {restore(name)}")
    found = _sha256_of_version(path, stat.st_size, stat.st_mtime_ns)
    if found != entry["sha256"]:
        raise DataFileError(
            f"{path} was altered: sha256 {found[:12]}…, expected {entry['sha256'][:12]}…. {restore(name)}"
        )
    return path


def sha256(path):
    """Return the sha256 of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)
def _sha256_of_version(path, size, mtime_ns):
    # Hash a file once a process for as long as its size and time stamp stay the same.
    return sha256(path)


def restore(name):
    """Return how to have the data file `name` back, as a sentence."""
    if name.startswith("checkpoints/"):
        return f"Restore it with `git checkout -- data/{name}`, or train it again with `make train`."
    return f"Restore it with `git checkout -- data/{name}`."


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on any error it is removed.

    A killed process therefore never leaves a half-written `path`. Raises `OSError`, which names `path`, where the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix + ".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
        partial.chmod(mode)
        os.replace(partial, path)
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:  # torch and safetensors do not always say that the disk is full
        if shutil.disk_usage(path.parent).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write `text` (UTF-8) to `path` in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_tensors(path, tensors, facts):
    """Write `tensors` and what is known about them to one safetensors file, with a checksum of both; return the bytes written.

    tensors: name → tensor, of any strides. facts: a dict that JSON can hold. No code is stored.
    """
    from safetensors.torch import save_file

    # One key, because safetensors keeps several in no particular order, and the same model should be the same bytes.
    metadata = {"course": json.dumps(facts | {"sha256": _checksum(facts, tensors)})}
    with replacing(path) as partial:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata=metadata)
        return partial.stat().st_size


def load_tensors(path, *, remedy):
    """Return `(facts, tensors)` that `save_tensors` wrote, the former still with its checksum; no code is run.

    facts is `{}` where somebody else wrote the file. Raises `FileNotFoundError`, and `ValueError`, which ends with `remedy`,
    for a file that is truncated or not of this kind.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("course", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors raises its own type, and JSON that nests too deep a RecursionError
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): {remedy}") from None
    return facts if isinstance(facts, dict) else {}, tensors


def check_tensors(path, facts, tensors, *, remedy):
    """Raise `ValueError` unless the checksum in `facts`, which is taken out of them, is that of facts and tensors."""
    if facts.pop("sha256", None) != _checksum(facts, tensors):
        raise ValueError(
            f"{path} is damaged: its contents differ from the checksum written with them. Copy it again from where it came, "
            f"or {remedy}"
        )


def _checksum(facts, tensors):
    import torch

    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # numpy lacks some of torch's types
    return digest.hexdigest()


def is_writable(folder):
    """Return whether `folder` is there and takes files: one of a read-only checkout does not, whoever asks."""
    return os.path.isdir(folder) and os.access(folder, os.W_OK)


def results_dir():
    """Return the folder for what your own runs make: `$COURSE_RESULTS`, else `results/` of the checkout; it is created.

    In a read-only checkout it is `temporary_dir`, which is said once.
    """
    folder = Path(os.environ.get("COURSE_RESULTS") or data_dir().parent / "results")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if is_writable(folder):
        return folder
    _say_once(f"{folder} cannot be written: results go to {temporary_dir()} (COURSE_RESULTS may name another folder).")
    return temporary_dir()


def cache_dir():
    """Return the folder for what can be made again: in the user's cache, or `temporary_dir` where there is none."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: nobody knows where this user's home is
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if is_writable(folder):
            return folder
    return temporary_dir()


def temporary_dir():
    """Return this user's folder in the system's temporary directory, which it shares with others; it is created."""
    folder = Path(tempfile.gettempdir()) / f"{FOLDER}-{getattr(os, 'getuid', int)()}"
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _say_once(sentence):
    print(sentence, file=sys.stderr)
