"""diffusers: a pipeline of which the model is one file or shards, mapped or read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, UNet2DModel

from tests.loaders import kit


def images(pipeline: Path) -> Mapping[str, Any]:
    """Of a directory, or of a name."""
    loaded = DDPMPipeline.from_pretrained(str(pipeline))
    loaded.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    images = loaded(generator=seed, num_inference_steps=2, output_type="np").images
    return {"images": kit.Near(images)} | loaded.unet.state_dict()


def component(pipeline: Path, **how: Any) -> Mapping[str, Any]:
    return dict(UNet2DModel.from_pretrained(pipeline, subfolder="unet", **how).state_dict())


WAYS: dict[str, kit.Way] = {
    "pipeline": images,
    "component": component,
    "component, disable_mmap": lambda pipeline: component(pipeline, disable_mmap=True),
}


if __name__ == "__main__":
    kit.run(
        {
            f"{kind}, {name}": lambda place, kind=kind, way=way: way(place / f"pipeline-{kind}")  # type: ignore[misc]
            for kind in kit.KINDS
            for name, way in WAYS.items()
        }
    )
