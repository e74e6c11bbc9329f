"""llama.cpp in all its ways to load a file, the gguf package, and transformers with `gguf_file`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import xllamacpp

from tests.loaders import kit

MODES = ("MMAP", "NONE", "DIRECT_IO", "MLOCK")
ASKED = {"prompt": [1, 270, 265, 273], "n_predict": 8, "temperature": 0, "return_tokens": True, "ignore_eos": True}
FILES = ("tiny-F32.gguf", "tiny-Q4.gguf")


def generated(file: Path, mode: str) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.load_mode = getattr(xllamacpp.llama_load_mode, f"LLAMA_LOAD_MODE_{mode}")
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params, params.verbosity = 64, 1, False, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    answer = xllamacpp.Server(params).handle_completions(ASKED | {"samplers": ["temperature"]})
    answer = json.loads(answer) if isinstance(answer, str) else answer
    return answer.get("tokens") or answer["choices"][0]["text"]


def llama_cpp(place: Path, mode: str) -> Mapping[str, Any]:
    return {name: generated(place / "gguf" / name, mode) for name in FILES}


def read(place: Path) -> Mapping[str, Any]:
    return {f"{f} {t.name}": t.data.copy() for f in FILES for t in gguf.GGUFReader(place / "gguf" / f).tensors}


if __name__ == "__main__":
    kit.run({mode: lambda place, mode=mode: llama_cpp(place, mode) for mode in MODES} | {"GGUFReader": read})  # type: ignore[misc]
