"""sentence-transformers, with the genuine MiniLM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from tests.loaders import kit


def embed(place: Path) -> Mapping[str, Any]:
    model = SentenceTransformer(str(place / "minilm"), device="cpu")
    embeddings = model.encode(["a cake is a layered thing", "weights fail silently"])
    return {"embeddings": kit.Near(embeddings)} | model.state_dict()


if __name__ == "__main__":
    kit.run({"encode": embed})
