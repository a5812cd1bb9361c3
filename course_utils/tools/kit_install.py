"""Install the course from its kit, without a network: `python install.py [FOLDER]`; `make kit` puts this file into the kit.

It needs nothing but Python of the version that the kit was made for. What is damaged is named before anything is installed; an
error or a stop leaves nothing half-made, and what a power cut left is done again by the next run.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


class KitError(Exception):
    """The course cannot be installed; the message says why and what to do."""


def needs(facts):
    """Return what the kit with these `facts` (of kit.json) runs on, as words."""
    return f"Python {facts['python']} on {facts['system']} {facts['machine']}"


def install(target, kit=HERE):
    """Install `kit`, the unpacked folder, into the folder `target`; return the path of the Python to use there.

    A `target` that holds the course keeps its files, and gets the packages only. Raises `KitError`, and `OSError`.
    """
    target = Path(target).absolute()
    facts = read(kit)
    venv = target / ".venv"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (venv / ".installed").exists():
        if (venv / ".kit").is_file() and (venv / ".kit").read_text() == facts["id"]:
            return python
        raise KitError(f"{venv} was not installed from this kit: name another folder, or delete {venv} first.")
    if target.exists() and any(target.iterdir()) and not (target / "course_utils").is_dir():
        raise KitError(f"{target} holds something else: name a folder that is empty or not there yet.")
    check_room(target, facts)
    check_files(kit, facts)
    made = not (target / "course_utils").is_dir()
    try:
        if made:
            unpack(kit / "course.zip", target)
        print("Installing the packages (some minutes) ...", flush=True)
        make_environment(venv, python, target, kit, facts)
    except BaseException:
        shutil.rmtree(target if made else venv, ignore_errors=True)
        raise
    return python


def read(kit):
    """Return the facts about `kit` from its kit.json, with an `id`. Raises `KitError` when it is not for this Python."""
    try:
        text = (kit / "kit.json").read_bytes()
        facts = json.loads(text)
        facts["id"] = hashlib.sha256(text).hexdigest()
        wanted = needs(facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KitError(f"kit.json is missing or damaged: unpack the kit again ({error}).") from None
    here = {"python": "{}.{}".format(*sys.version_info), "system": platform.system(), "machine": platform.machine()}
    if any(facts[key] != value for key, value in here.items()):
        raise KitError(
            f"This kit is for {wanted}; this is {needs(here)}. Run it with that Python, or get a kit made for this."
        )
    return facts


def check_room(target, facts):
    """Raise `KitError` if the disk of `target` has less room than the kit takes."""
    place = next(folder for folder in (target, *target.parents) if folder.exists())
    needed, free = facts["needs_bytes"] / 1e9, shutil.disk_usage(place).free / 1e9
    print(f"The course takes {needed:.1f} GB; {free:.1f} GB are free.", flush=True)
    if free < needed:
        raise KitError("That is too little room: free some, or name a folder on another disk.")


def check_files(kit, facts):
    """Raise `KitError` naming every file of `kit` that is missing or damaged."""
    total = sum(entry["bytes"] for entry in facts["files"].values()) / 1e9
    print(f"Checking {len(facts['files'])} files, {total:.1f} GB ...", flush=True)
    bad = []
    for name, entry in facts["files"].items():
        path = kit / name
        if not path.is_file():
            bad.append(f"{name} is missing")
        elif sha256(path) != entry["sha256"]:
            bad.append(f"{name} is damaged")
    if bad:
        raise KitError("Copy and unpack the kit again: " + ", ".join(bad) + ".")


def sha256(path):
    """Return the sha256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive, target):
    """Unpack the zip file `archive` to the folder `target`, which is there whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as course:
            course.extractall(partial)
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()  # an empty folder may be in the place
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_environment(venv, python, target, kit, facts):
    """Make the virtual environment `venv` with all packages of `kit`; its `.installed`, written last, says that it is whole."""
    run(sys.executable, "-m", "venv", "--clear", venv)
    requirements = venv / "requirements.txt"
    requirements.write_text("\n".join(facts["requirements"]) + "\n", encoding="utf-8")
    pip = [
        python,
        "-m",
        "pip",
        "--isolated",
        "--disable-pip-version-check",
        "--quiet",
    ]  # isolated: no settings of the user's
    run(
        *pip,
        "install",
        "--no-index",
        "--find-links",
        kit / "wheels",
        "--no-deps",
        "--require-hashes",
        "-r",
        requirements,
    )
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Relative, so that letters beyond ASCII in the path do no harm.
    (site / "squeeze_and_speed_up.pth").write_text(os.path.relpath(target, site) + "\n", encoding="ascii")
    for wheel in sorted((kit / "gguf").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(venv / "gguf")
    (venv / ".kit").write_text(facts["id"])
    (venv / ".installed").write_text(facts["variant"] + "\n")


def run(*command):
    """Return what `command` printed. Raises `KitError` with what it said when it fails."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode(errors="replace")
    if done.returncode:
        raise KitError(f"{' '.join(map(str, command[:4]))} failed:\n{said.strip()[-3000:]}")
    return said


def main():
    parser = argparse.ArgumentParser(description="Install the course from this kit, without a network.")
    parser.add_argument("folder", nargs="?", default="squeeze-and-speed-up", help="where to (%(default)s)")
    target = Path(parser.parse_args().folder)

    def stop(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        python = install(target)
    except (KitError, OSError) as error:
        print(f"Not installed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; nothing is left. Run it again when you like.", file=sys.stderr)
        return 130
    print("Installed. What this machine has for the course:\n", flush=True)
    code = subprocess.run([str(python), "-m", "course_utils.tools.doctor"], cwd=target).returncode
    here = target.absolute()
    print(f'\nTo open the course:\n    cd "{here}"\n    "{python.relative_to(here)}" -m course_utils lab')
    return code


if __name__ == "__main__":
    sys.exit(main())
