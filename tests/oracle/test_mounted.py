"""Merges through everything: from a hub, by commands, read from a mount, held against mergekit."""

import hashlib
import re
from pathlib import Path

import pytest

from tests.hub import Hub
from tests.mounts import Cakefs, needs_fuse
from tests.oracle.test_mergekit import MIXTRAL, RECIPES, differences_once_fused, theirs
from tests.test_views import read_in_pieces

pytestmark = [needs_fuse, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

CASES = (
    "two models", "tied", "qwen2", "qwen3", "gemma2", "gpt2", "scale", "mixed dtypes", "linear",
    "linear, not divided, with gradients", "linear of three dtypes", "task", "task, narrowed",
)  # fmt: skip
FAMILIES = r"llama-\w+|tied-a|qwen2|qwen3|gemma2|gpt2|mixtral"


def test_the_mounted_files_are_mergekits(zoo: Path, hub: Hub, tmp_path: Path) -> None:
    """Calculated in 16 bits and more, and read in pieces that fit no element."""
    cakefs = Cakefs(tmp_path, hub.endpoint)
    models = [f"org/{path.name}" for path in sorted(zoo.iterdir()) if re.fullmatch(FAMILIES, path.name)]
    for model in models:
        hub.add_repo(model, zoo / model.removeprefix("org/"))
    cakefs.add_all(models)
    recipes = [RECIPES[case] for case in CASES] + [MIXTRAL]
    for i, recipe in enumerate(recipes):
        (tmp_path / f"{i}.yml").write_text(re.sub(rf"(model: )(?={FAMILIES})", r"\1org/", recipe))
        cakefs.run("merge", str(tmp_path / f"{i}.yml"), "--as", f"merged-{i}")
    with cakefs.mounted() as mountpoint:
        for i, recipe in enumerate(recipes):
            expected = (theirs(zoo, recipe, tmp_path / str(i)) / "model.safetensors").read_bytes()
            served = read_in_pieces(mountpoint / f"merged-{i}" / "model.safetensors")
            if recipe == MIXTRAL:
                assert differences_once_fused(served, expected) == []
            else:
                assert hashlib.sha256(served).digest() == hashlib.sha256(expected).digest(), recipe
