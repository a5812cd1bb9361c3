"""The page on the architecture is true to the code: every module has a room, and imports go down."""

import re

from tests.test_house import PACKAGE, ROOT, SOURCES, dotted, own_imports

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = {
    room: re.findall("`([^`]+)`", modules)
    for room, modules in re.findall(r"^\| ([\w ]+) \| ((?:`\w+` ?)+) \|", PAGE, flags=re.MULTILINE)
}


def modules():
    """The modules at the top of the course, packages as one."""
    return {dotted(path).split(".")[1] for path in SOURCES if dotted(path) != "course_utils"}


def test_every_module_has_one_room():
    placed = [module for room in ROOMS.values() for module in room]
    assert sorted(placed) == sorted(modules())


def test_imports_go_down_or_stay_in_a_room():
    floor = {module: number for number, room in enumerate(ROOMS.values()) for module in room}
    found = set()
    for path in SOURCES:
        for name in own_imports(path):
            upper, lower = dotted(path).split(".")[1:2], name.split(".")[1:2]
            if upper and lower and floor[lower[0]] < floor[upper[0]]:
                found.add(f"{dotted(path)} imports {name}, which is above it")
    assert not found, sorted(found)


def test_every_file_it_sends_readers_to_exists():
    named = set(re.findall(r"`([\w./]+\.(?:py|json|txt|ipynb))`", PAGE))
    assert len(named) >= 12
    missing = [name for name in named if not any((folder / name).exists() for folder in (PACKAGE, ROOT))]
    assert not missing
