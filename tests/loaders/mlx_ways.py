"""mlx and mlx-lm, on the CPU: threads that pread."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten

from tests.loaders import kit


def arrays(model: Path) -> Mapping[str, Any]:
    return {name: array for file in sorted(model.glob("*.safetensors")) for name, array in mx.load(str(file)).items()}


def generated(model: Path, **how: Any) -> Mapping[str, Any]:
    loaded, tokenizer = mlx_lm.load(str(model), **how)
    tokens = [answer.token for answer in mlx_lm.stream_generate(loaded, tokenizer, [1, 2, 3], max_tokens=4)]
    return {"tokens": tokens} | dict(tree_flatten(loaded.parameters()))


if __name__ == "__main__":
    kit.run(
        kit.of_each_kind(
            {"mx.load": arrays, "mlx_lm": generated, "mlx_lm, lazy": lambda model: generated(model, lazy=True)}
        )
    )
