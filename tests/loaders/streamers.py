"""The load formats of inference servers that read with O_DIRECT, on the CPU.

`LOADER` in the environment says which one: they are two rows of README's table.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.loaders import kit


def shards(model: Path) -> list[str]:
    return [str(file) for file in sorted(model.glob("*.safetensors"))]


def runai(model: Path) -> Mapping[str, Any]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(shards(model))
        return {name: tensor.clone() for name, tensor in streamer.get_tensors()}


def fast(model: Path) -> Mapping[str, Any]:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(shards(model), nogds=True, device="cpu") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (it is no dict)


WAYS: dict[str, kit.Way] = {"runai-model-streamer": runai, "fastsafetensors": fast}


if __name__ == "__main__":
    kit.run(kit.of_each_kind({"whole": WAYS[os.environ["LOADER"]]}))
