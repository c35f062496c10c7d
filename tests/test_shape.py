"""The shape of the house: what a newcomer needs to find a room stays as it is promised."""

from __future__ import annotations

import ast
import re
import statistics
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.support.processes import ROOT

PACKAGE = ROOT / "billing_worker"
FILES = [path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts]
MOST_FLAT_IN_SERVICES = 6
MOST_IN_A_FOLDER = 22
MOST_IMPORTS = 10
LONGEST_FILE = 600
MOST_README_WORDS = 1_800


def _modules(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.py") if path.name != "__init__.py"]


def test_services_hold_rooms_and_few_files_beside_them():
    assert len(_modules(PACKAGE / "services")) <= MOST_FLAT_IN_SERVICES


def test_no_folder_holds_more_files_than_a_reader_can_overlook():
    folders = {path.parent for path in FILES if path.parent.name != "cli"}
    crowded = {
        str(f.relative_to(ROOT)): n for f in folders if (n := len(_modules(f))) > MOST_IN_A_FOLDER
    }
    assert crowded == {}


def _imports(path: Path) -> int:
    tree = ast.parse(path.read_text())
    return sum(
        isinstance(node, ast.Import | ast.ImportFrom)
        and getattr(node, "module", "") != "__future__"
        for node in tree.body
    )


def test_a_file_imports_few_modules():
    assert (
        statistics.median(_imports(path) for path in FILES if path.stat().st_size) <= MOST_IMPORTS
    )


def _imported(path: Path) -> set[str]:
    """The names of our modules that the file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & MODULES.keys()


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}


def test_no_modules_import_one_another_in_a_circle():
    waiting = {name: _imported(path) - {name} for name, path in MODULES.items()}
    while free := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {name: needs for name, needs in waiting.items() if name not in free}
    assert waiting == {}


def test_no_function_imports():
    inside = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert inside == []


ASKED_OF_EVERY_MODULE = {"BY", "TRANSITIONS"}
"""One question with an answer in each module: who decides here, and what may follow a state."""


def _constants(path: Path) -> Iterator[tuple[str, str]]:
    """The names that others may import, with what they stand for."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name) and re.fullmatch("[A-Z][A-Z_0-9]+", name.id):
                    yield name.id, ast.unparse(value)


def test_no_constant_has_one_name_and_two_values():
    values: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        for name, value in _constants(path):
            values[name].add(value)
    several = {name for name, meant in values.items() if len(meant) > 1}
    assert several - ASKED_OF_EVERY_MODULE == set()


def test_no_file_is_longer_than_one_subject_needs():
    long = {
        str(p.relative_to(ROOT)): n
        for p in [*FILES, *(ROOT / "tests").rglob("*.py")]
        if (n := len(p.read_text().splitlines())) > LONGEST_FILE
    }
    assert long == {}


def test_the_readme_is_read_in_ten_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_README_WORDS


def test_every_library_that_is_imported_is_declared():
    """One that only comes along with another may be gone, or another one, with its next version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {_name(re.split(r"[^\w-]", one)[0]) for one in project["dependencies"]}
    imported = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    theirs = imported - sys.stdlib_module_names - {"billing_worker"}
    distributions = packages_distributions()
    assert {
        name
        for name in theirs
        if not declared & {_name(one) for one in distributions.get(name, [name])}
    } == set()


def _name(distribution: str) -> str:
    """As package indexes compare them (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
