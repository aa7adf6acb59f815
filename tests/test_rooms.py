"""The house as it is meant: no circle of imports, no file too long to read, no folder too full to know."""

from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
ROOMS = ("export", "plugins", "runtime")


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph(*(f"headfold.{room}" for room in ROOMS))
    ours = sorted(module for module in graph.modules if module.startswith("headfold."))
    after = {module: graph.find_modules_directly_imported_by(module) for module in ours}
    settled: set[str] = set()
    while len(settled) < len(ours):  # take away what imports nothing that is left
        free = {module for module in ours if module not in settled and after[module] <= settled}
        assert free, f"a circle among {sorted(set(ours) - settled)}"
        settled |= free


def test_no_file_is_over_400_lines() -> None:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert [path.relative_to(ROOT) for path in files if len(path.read_text().splitlines()) > 400] == []


def test_every_room_says_what_lives_there() -> None:
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("__init__.py")):
        assert path.read_text().startswith('"""'), path


def test_no_folder_has_more_than_ten_modules() -> None:
    folders = [path.parent for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    modules = {folder: [path for path in folder.glob("*.py") if path.stem != "__init__"] for folder in folders}
    assert [folder.relative_to(ROOT) for folder, found in modules.items() if len(found) > 10] == []
