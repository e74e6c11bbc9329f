"""safetensors itself: torch and numpy, mapped and read, whole and in parts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch
from safetensors import safe_open

from tests.loaders import kit

MATRIX = "model.layers.1.mlp.down_proj.weight"


def files(model: Path) -> Iterator[Path]:
    return iter(sorted(model.glob("*.safetensors")))


def load_file(model: Path, **how: Any) -> Mapping[str, Any]:
    return {name: tensor for file in files(model) for name, tensor in safetensors.torch.load_file(file, **how).items()}


def load_bytes(model: Path) -> Mapping[str, Any]:
    return {k: tensor for file in files(model) for k, tensor in safetensors.torch.load(file.read_bytes()).items()}


def lazily(model: Path, framework: str, **how: Any) -> Mapping[str, Any]:
    found = {}
    for path in files(model):
        with safe_open(path, framework=framework, **how) as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    return found


def slices(model: Path, **how: Any) -> Mapping[str, Any]:
    """Rows, columns and both: of one matrix, of which the rest is not asked for."""
    for path in files(model):
        with safe_open(path, framework="pt", **how) as file:
            if MATRIX in file.keys():  # noqa: SIM118
                part = file.get_slice(MATRIX)
                return {"rows": part[8:16], "columns": part[:, 5:9], "both": part[1:3, 90:], "shape": part.get_shape()}
    return {}


if __name__ == "__main__":
    kit.run(
        kit.of_each_kind(
            {
                "load_file": load_file,
                "load_file, pread": lambda model: load_file(model, backend="pread"),
                "load of bytes": load_bytes,
                "safe_open, torch": lambda model: lazily(model, "pt"),
                "safe_open, torch, pread": lambda model: lazily(model, "pt", backend="pread"),
                "get_slice": slices,
                "get_slice, pread": lambda model: slices(model, backend="pread"),
            }
        )
        | {  # numpy has no bfloat16
            "numpy, load_file": lambda place: safetensors.numpy.load_file(
                place / "pipeline-single/unet/diffusion_pytorch_model.safetensors"
            ),
            "numpy, safe_open": lambda place: lazily(place / "pipeline-sharded/unet", "np"),
        }
    )
