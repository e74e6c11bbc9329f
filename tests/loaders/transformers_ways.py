"""transformers, 5 and 4: all ways in which `from_pretrained` brings weights, and accelerate's own."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
import transformers

from tests.loaders import kit

VERSION = int(transformers.__version__.split(".")[0])
IDS = torch.arange(20)[None]
PARTS = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
OFFLOADED = dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}

transformers.utils.logging.set_verbosity_error()


def load(model: Path, **how: Any) -> Mapping[str, Any]:
    return used(transformers.AutoModelForCausalLM.from_pretrained(model, **how))


def used(model: Any) -> Mapping[str, Any]:
    with torch.no_grad():
        logits = model(IDS).logits
    weights = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    return {"logits": kit.Near(logits.float())} | weights


def offloaded(model: Path) -> Mapping[str, Any]:
    """Layers that stay in the file until a forward wants them, each time anew."""
    with tempfile.TemporaryDirectory() as folder:
        return load(model, device_map=OFFLOADED, offload_folder=folder)


def one_thread(model: Path) -> Mapping[str, Any]:
    with mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}):
        return load(model)


def dispatched(model: Path) -> Mapping[str, Any]:
    config = transformers.AutoConfig.from_pretrained(model)
    with accelerate.init_empty_weights(include_buffers=False):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    return used(accelerate.load_checkpoint_and_dispatch(empty, model, device_map={"": "cpu"}))


WAYS = {
    "plain": load,
    "float32": lambda model: load(model, dtype=torch.float32),
    "device_map": lambda model: load(model, device_map="auto"),
    "disk offload": offloaded,
    "accelerate": dispatched,
    "tokenizer": lambda model: {
        "ids": transformers.PreTrainedTokenizerFast.from_pretrained(model)("a cake")["input_ids"]
    },
}
if VERSION >= 5:  # It loads with threads unless told otherwise.
    WAYS |= {"one thread": one_thread, "disable_mmap": lambda model: load(model, disable_mmap=True)}


if __name__ == "__main__":
    kit.run(kit.of_each_kind(WAYS))
