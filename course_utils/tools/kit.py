"""Pack the course and all its packages into one archive for machines without a network: `make kit`, into results/kit.

The kit fits machines like this one: same system, same processor, same minor version of Python. It holds the last commit, one
wheel for each pinned package, and `install.py` (here `kit_install.py`), which needs nothing but Python. A run that was stopped
goes on where it was: wheels that are here already are not fetched again.
"""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.parse
import zipfile
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from course_utils import files
from course_utils.tools import kit_install

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 4096  # bytes that disks give to files at once
FOLDER = "squeeze-and-speed-up-kit"  # what the archive unpacks to
README = """The course "Squeeze & Speed Up" for machines without a network.

    python install.py [FOLDER]

installs it into FOLDER (squeeze-and-speed-up if left out) and looks whether this machine is fit. It needs {needs},
and {gigabytes:.1f} GB beside this kit. Whatever goes wrong is said, and nothing half-made is left; run it again then.
"""


class KitError(RuntimeError):
    """No kit can be made; the message says why and what to do."""


def build(root=ROOT, target=None, *, torch="", engines=False):
    """Make the kit of the checkout `root` in the folder `target` (results/kit); return the path of the archive.

    torch: "" or "cpu", as for `make setup`. engines: with the packages of requirements-engines.lock and notebook 05's language
    model. Beside the archive lies a list of what is in it, NAME.sha256, as `sha256sum --check` reads it. Raises `KitError`.
    """
    target = Path(target or files.results_dir() / "kit")
    pins = ["requirements-engines.lock" if engines else "requirements.lock", "requirements-torch.txt"]
    facts = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "system": platform.system(),
        "machine": platform.machine(),
        "variant": " ".join(filter(None, [torch, "engines" if engines else ""])),
    }
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    if changed := _git(root, "status", "--porcelain").decode().splitlines():
        print(f"The kit holds the last commit, without what was changed since in {len(changed)} files.", flush=True)

    # What is fetched belongs to these pins; other pins get a folder of their own.
    key = hashlib.sha256(json.dumps(facts).encode() + b"".join((root / name).read_bytes() for name in pins)).hexdigest()
    parts = target / f"parts-{key[:12]}"
    fetched = {"wheels": _fetch_packages(root, pins, parts, torch), "gguf": []}
    if engines:
        fetched["gguf"] = _download(parts / "gguf", "--require-hashes", "-r", root / "requirements-gguf.txt")

    with tempfile.TemporaryDirectory() as scratch:
        course = Path(scratch) / "course.zip"
        course.write_bytes(_git(root, "archive", "--format=zip", commit))
        contents = {f"{part}/{path.name}": path for part, paths in fetched.items() for path in paths}
        contents |= {"course.zip": course, "install.py": Path(kit_install.__file__)}
        listed = {name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for name, path in contents.items()}
        facts |= {"commit": commit, "needs_bytes": _unpacked([*fetched["wheels"], *fetched["gguf"], course])}
        facts |= {"requirements": _requirements(listed), "files": listed}
        texts = {
            "kit.json": json.dumps(facts, indent=1) + "\n",
            "README.txt": README.format(needs=kit_install.needs(facts), gigabytes=facts["needs_bytes"] / 1e9),
        }
        version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        words = [version, facts["system"], facts["machine"], f"python{facts['python']}", *facts["variant"].split()]
        archive = target / f"{FOLDER}-{'-'.join(words)}.zip".lower()
        with files.replacing(archive) as partial:
            _zip(partial, contents, texts)
    digests = [(files.sha256(archive), archive.name)]
    digests += [(hashlib.sha256(text.encode()).hexdigest(), f"{FOLDER}/{name}") for name, text in texts.items()]
    digests += [(entry["sha256"], f"{FOLDER}/{name}") for name, entry in sorted(listed.items())]
    files.write_text(archive.with_suffix(".sha256"), "".join(f"{digest}  {name}\n" for digest, name in digests))
    for parts in target.glob("parts-*"):
        shutil.rmtree(parts)
    return archive


def _fetch_packages(root, pins, parts, torch):
    """Return the wheels of all packages that `pins` name for this machine, checked against the hashes of lock and index."""
    lock = root / pins[0]
    wheels = _download(parts / "wheels", "--require-hashes", "-r", lock)
    # torch's file has no hashes, since its builds differ by machine: the index tells them, with all that torch brings along.
    resolved = parts / "pylock.toml"
    backend = [f"--torch-backend={torch}"] if torch else []
    _run(
        *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--python", sys.executable, *backend),
        *("--format", "pylock.toml", "--output-file", resolved, *(root / name for name in pins)),
        failed="The builds of torch could not be looked up. ",
    )
    packages = tomllib.loads(resolved.read_text(encoding="utf-8"))["packages"]
    pinned = {parse_wheel_filename(path.name)[:2] for path in wheels}
    lines = []
    for package in packages:
        address, name, digest = _best_wheel(package, parts)
        if parse_wheel_filename(name)[:2] not in pinned:
            lines.append(f"{package['name']} @ {address}#sha256={digest}\n")
    files.write_text(parts / "torch.txt", "".join(lines))
    return _download(parts / "wheels", "-r", parts / "torch.txt") if lines else wheels


def _best_wheel(package, folder):
    """Return `(address, file name, sha256)` of the wheel of a package of pylock.toml that fits this machine best."""
    rank = {tag: number for number, tag in enumerate(sys_tags())}
    fitting = []
    for wheel in package.get("wheels", ()):
        address = wheel.get("url") or (folder / wheel["path"]).resolve().as_uri()
        name = wheel.get("name") or urllib.parse.unquote(address.rpartition("/")[2])
        ranks = [rank[tag] for tag in parse_wheel_filename(name)[3] if tag in rank]
        if ranks:
            fitting.append((min(ranks), address, name, wheel["hashes"]["sha256"]))
    if not fitting:
        raise KitError(f"{package['name']} {package['version']} has no wheel for this machine, so no kit can hold it.")
    return min(fitting)[1:]


def _download(folder, *what):
    """Fetch wheels into `folder`, but those that it holds; return the paths of all that it holds then."""
    _run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--only-binary", ":all:", "--dest", folder, *what),
        failed="A package could not be fetched; what is here already is kept, so try again. ",
    )
    return sorted(folder.glob("*.whl"))


def _requirements(listed):
    """Return the lines of a requirements file that names every wheel with its hash."""
    lines = []
    for path, entry in sorted(listed.items()):
        if path.startswith("wheels/"):
            name, version, *_ = parse_wheel_filename(path.removeprefix("wheels/"))
            lines.append(f"{name}=={version} --hash=sha256:{entry['sha256']}")
    return lines


def _unpacked(archives):
    """Return about how many bytes zip files take on a disk, unpacked: in blocks, and with what Python compiles."""
    total = 0
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                blocks = -(-info.file_size // BLOCK)
                total += BLOCK * blocks * (2 if info.filename.endswith(".py") else 1)
    return int(1.03 * total)  # folders, pip itself and its records


def _zip(path, contents, texts):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # wheels are compressed already
        for name, text in texts.items():
            archive.writestr(f"{FOLDER}/{name}", text)
        for name, source in sorted(contents.items()):
            archive.write(source, f"{FOLDER}/{name}")


def _git(root, *arguments):
    try:
        return _run("git", "-C", root, *arguments, failed="A kit is made of a clone: get the course with git. ").stdout
    except FileNotFoundError:
        raise KitError("A kit is made of a clone, with git: install git.") from None


def _run(*command, failed):
    done = subprocess.run([str(word) for word in command], capture_output=True)
    if done.returncode:
        raise KitError(failed + (done.stderr or done.stdout).decode(errors="replace").strip()[-2000:])
    return done


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m course_utils.tools.kit", description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", default="", choices=["", "cpu"], help="cpu: the smaller builds for processors")
    parser.add_argument("--engines", action="store_true", help="with every engine, and notebook 05's language model")
    options = parser.parse_args(arguments)
    print("Fetching the packages ...", flush=True)
    try:
        archive = build(torch=options.torch, engines=options.engines)
    except (KitError, OSError) as error:
        print(f"No kit was made. {error}", file=sys.stderr)
        return 2
    listing = archive.with_suffix(".sha256")
    print(f"{archive}  {archive.stat().st_size / 1e9:.2f} GB\n{listing}  {len(listing.read_text().splitlines())} sums")
    return 0


if __name__ == "__main__":
    sys.exit(main())
