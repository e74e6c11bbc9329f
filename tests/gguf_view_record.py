"""Records what llama.cpp's converter makes of the models in `gguf_view_models`.

    python -m tests.gguf_view_record DIRECTORY [KEEP]

DIRECTORY has convert_hf_to_gguf.py (`vendor/llama.cpp` in the sdist of llama-cpp-python); torch, transformers and
sentencepiece are needed. With KEEP, models and files are left there, to look into where a digest differs.
"""

import hashlib
import json
import runpy
import sys
import tempfile
from pathlib import Path

from tests.gguf_view_models import CASES, outtype

RECORD = Path(__file__).parent / "fixtures" / "gguf_view.json"


def record(converter: Path, keep: Path) -> dict[str, str]:
    """SHA-256 of the converter's file by case."""
    sys.path[1:1] = [str(converter / "gguf-py"), str(converter)]
    from conversion import base  # type: ignore[import-not-found]

    digests = {}
    for name, case in CASES.items():
        directory, made = keep / name, keep / f"{name}.gguf"
        for path, data in case.files.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(data)
        # It knows a pre-tokenizer by the ids that a known vocabulary gives a text; these vocabularies are not known.
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=case.pre: pre
        program = str(converter / "convert_hf_to_gguf.py")
        sys.argv = [program, str(directory), "--outfile", str(made), "--outtype", outtype(case.files)]
        runpy.run_path(program, run_name="__main__")
        digests[name] = hashlib.sha256(made.read_bytes()).hexdigest()
    return digests


def main() -> None:
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        keep = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch)
        digests = record(Path(sys.argv[1]).resolve(), keep)
    facts = {"converter": "llama-cpp-python 0.3.36", "transformers": transformers.__version__, "sha256": digests}
    RECORD.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
