"""The import rule is a star, and the extras stay out until they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dbojax

PACKAGE = Path(dbojax.__file__).parent
EXTRAS = {"sklearn", "flax", "matplotlib", "tqdm", "networkx", "orbax"}
# The command line composes, as users do; so it may import anything.
EDGES = {"dbojax", "dbojax.cli", "dbojax.launch", "dbojax.__main__"}
# A driver above the parts, which composes as users do.
DRIVERS = "dbojax.comparison"
# Algorithms and optimisers compose parts, and know neither data nor drivers.
COMPOSERS = {"dbojax.algorithms", "dbojax.optim"}
NOT_PARTS = {
    *("dbojax.tasks", "dbojax.runner", "dbojax.plots", "dbojax.cli", "dbojax.launch"),
    DRIVERS,
}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def folder(module):
    """The subpackage of a module, if it is in one."""
    own = module if PATHS[module].name == "__init__.py" else module.rpartition(".")[0]
    return own if own != "dbojax" else None


def imported(nodes):
    """Full names of the modules that these statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in PATHS else node.module


def at_import_time(tree):
    """Statements that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import_time(node)


def tree_of(module):
    return ast.parse(PATHS[module].read_text("utf-8"))


def may_import(module, other):
    if module == "dbojax.base":
        return False
    if module == "dbojax.trees":
        return other == "dbojax.base"
    if folder(module) and (other == folder(module) or folder(other) == folder(module)):
        return True
    if folder(module) in COMPOSERS:
        part = ".".join(other.split(".")[:2])
        return part not in NOT_PARTS | COMPOSERS | {"dbojax"}
    return other in {"dbojax.base", "dbojax.trees"}


@pytest.mark.parametrize(
    "module", sorted(m for m in set(PATHS) - EDGES if folder(m) != DRIVERS)
)
def test_modules_meet_in_base_and_trees_only(module):
    ours = {name for name in imported(ast.walk(tree_of(module))) if name in PATHS}
    forbidden = {other for other in ours if not may_import(module, other)}
    assert not forbidden, f"{module} may not import {sorted(forbidden)}"


@pytest.mark.parametrize("module", sorted(PATHS))
def test_no_module_imports_an_extra_when_it_is_imported(module):
    names = {
        name.partition(".")[0] for name in imported(at_import_time(tree_of(module)))
    }
    assert not names & EXTRAS


def test_importing_the_package_leaves_the_extras_out():
    code = "import dbojax, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert "dbojax" in found.stdout.split()
    assert not EXTRAS & set(found.stdout.split())
