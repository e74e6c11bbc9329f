"""Imports point down only: the picture of the layers, as a table that every import statement is held against."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cakefs

LEAVES = {"model", "errors", "buffers"}
PURE = LEAVES | {"formats", "plan"}  # these may not touch IMPURE of the standard library either
IMPURE = {"os", "time", "logging"}

# part -> what it may import: parts of cakefs, then third-party names. msgspec is for all.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"api"},
    "errors": set(),
    "buffers": set(),
    "model": {"errors"},
    "config": {"errors", "platformdirs"},
    "formats": LEAVES | {"yaml"},
    "plan": LEAVES | {"formats", "numpy"},
    "store": PURE | {"lmdb", "xxhash"},
    "execute": set(),
    "remotes": PURE | {"trio", "httpx", "httpcore", "h11", "huggingface_hub"},
    "engine": PURE | {"config", "execute", "store", "remotes", "trio"},
    "app": PURE | {"config", "store", "remotes", "engine", "trio", "huggingface_hub"},
    "api": PURE | {"config", "engine", "app", "trio", "numpy", "fsspec"},
    "fs": PURE | {"config", "trio", "pyfuse3"},
    "cli": PURE | {"config", "execute", "store", "engine", "app", "fs", "trio", "rich"},
    "__main__": {"cli"},
}


def imported(source: str, path: Path) -> Iterator[str]:
    """The part of cakefs, or the library, that each import of a module names; relative ones resolved."""
    package = ["cakefs", *path.parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*base, alias.name] for alias in node.names]
        yield from (name[1] if name[0] == "cakefs" and len(name) > 1 else name[0] for name in names)


def violations(source: str, path: Path) -> list[str]:
    part = path.parts[0].removesuffix(".py")
    if part not in ALLOWED:
        return [f"{path}: {part} is not in the table"]
    standard = sys.stdlib_module_names - (IMPURE if part in PURE else set())
    allowed = ALLOWED[part] | standard | {part, "msgspec", "cakefs", "__version__"}
    return [f"{path}: {part} may not import {name}" for name in imported(source, path) if name not in allowed]


def test_imports_point_down_only() -> None:
    root = Path(cakefs.__file__).parent
    found = [v for path in root.rglob("*.py") for v in violations(path.read_text(), path.relative_to(root))]
    assert found == []


def test_table_has_no_cycle() -> None:
    TopologicalSorter(ALLOWED).prepare()  # raises CycleError; what is imported is a subset of it


def test_modules_import_each_other_in_no_circle() -> None:
    root = Path(cakefs.__file__).parent
    modules = {".".join(["cakefs", *p.relative_to(root).with_suffix("").parts]): p for p in root.rglob("*.py")}
    graph = {}
    for module, path in modules.items():
        froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        named = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        graph[module] = {name for name in named | {str(node.module) for node in froms} if name in modules}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "source",
    [
        "import os.path",
        "from time import monotonic",
        "def late():\n    import trio",
        "import cakefs.store.store",
        "from cakefs.store import store",
        "from cakefs import engine",
        "from .. import engine",
        "from ..engine.read import FileReader",
    ],
)
def test_violation_is_found(source: str) -> None:
    assert len(violations(source, Path("plan/layout.py"))) == 1


def test_what_is_allowed_is_not_reported() -> None:
    fine = "import bisect, msgspec\nfrom . import ranges\nfrom .ranges import split\nfrom ..model import Span"
    assert violations(fine, Path("plan/layout.py")) == []
    assert violations("", Path("surprise.py")) == ["surprise.py: surprise is not in the table"]


@pytest.mark.parametrize(
    ("library", "only"), [("pyfuse3", "fs"), ("lmdb", "store"), ("xxhash", "store"), ("httpx", "remotes")]
)
def test_library_of_one_part(library: str, only: str) -> None:
    assert [part for part in ALLOWED if not violations(f"import {library}", Path(part, "x.py"))] == [only]
