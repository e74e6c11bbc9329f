"""Rewritten configs held against every config class of transformers: no layer may change its kind in silence."""

import copy
import importlib
import inspect
import json
import pkgutil
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from cakefs.errors import UserError
from cakefs.plan.modelconfig import Take, rewrite_config
from cakefs.plan.sections import find_section, section_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("mergekit", reason="mergekit is not installed: pip install 'cakefs[oracle]'")
    import transformers

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

KINDS = (
    "layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "layer_rope_theta", "attention_layers",
    "activation_sparsity_pattern", "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "indexer_types",
    "layers_num_experts",
)  # fmt: skip
INDICES = ("moe_layers", "full_attn_idxs", "cross_attention_layers")
# What the classes work out from the rules when it is not in the file.
DERIVED = (*KINDS, *INDICES, "per_layer_config")
# They count by other lists (`depths`), and none of their files has layers to stack.
ODD = {"ClapConfig", "EfficientNetConfig"}


def classes() -> Iterator[Any]:
    seen = set()
    for module in pkgutil.iter_modules(transformers.models.__path__):
        try:
            found = importlib.import_module(f"transformers.models.{module.name}.configuration_{module.name}")
        except ImportError:
            continue
        for kind in vars(found).values():
            own = inspect.isclass(kind) and kind.__module__ == found.__name__ and kind not in seen
            if own and issubclass(kind, transformers.PreTrainedConfig):
                seen.add(kind)
                yield kind


def load(kind: Any, config: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The part of a config object that speaks of the layers; None where the class refuses these values."""
    try:
        made = kind.from_dict(copy.deepcopy(config))
    except Exception:
        return None
    for key in path:
        made = getattr(made, key)
    return made


def told(config: Any, key: str) -> Any:
    value = getattr(config, key, None)
    return list(value) if isinstance(value, list | tuple) else None


@pytest.mark.parametrize("stripped", [False, True], ids=["as saved", "without what follows from rules"])
def test_every_config_class(stripped: bool) -> None:
    rng, wrong, right = random.Random(1), [], 0
    for kind in classes():
        try:
            config = json.loads(kind().to_json_string(use_diff=False))
        except Exception:
            continue
        section = find_section(config)
        if section is None or kind.__name__ in ODD:
            continue
        if stripped:
            for key in DERIVED:
                section_of(config, section).pop(key, None)
        before, n = load(kind, config, section.path), section.layers
        orders = [[*range(n // 2 + 1), *range(n // 4, n)], sorted(rng.sample(range(n), max(1, n - 2)))]
        for order in orders if before is not None else ():
            try:
                new = rewrite_config([config], [section], [Take(0, i) for i in order]).config
            except UserError:
                continue
            after = load(kind, new, section.path)
            if after is None:
                continue
            right += 1
            for key in KINDS:
                values = told(before, key)
                if values is not None and len(values) == n and told(after, key) != [values[i] for i in order]:
                    wrong.append((kind.__name__, key, order))
            for key in INDICES:
                values = told(before, key)
                if values is not None and told(after, key) != [j for j, i in enumerate(order) if i in values]:
                    wrong.append((kind.__name__, key, order))
    assert wrong == []
    assert right > 1000
