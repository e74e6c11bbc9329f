"""`cakefs compare` over a real hub: what is known to be equal is not read, of the rest just its ranges are fetched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hub import Hub
from tests.inside import Inside
from tests.models import CONFIG, llama, sharded, single, tensor


@pytest.fixture
def cli(tmp_path: Path, hub: Hub) -> Inside:
    return Inside(tmp_path, hub)


def nudged(tensors: Mapping[str, Any], name: str, by: float) -> dict[str, Any]:
    """The same with one element of one tensor moved."""
    changed = tensors[name].copy()
    changed.reshape(-1)[17] += np.float32(by)
    return {**tensors, name: changed}


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_two_models_that_were_never_fetched(cli: Inside, hub: Hub) -> None:
    """Sharded alike: shards that are equal files are known to be equal, the other shard is read on both sides."""
    base = llama(3, width=512)
    tuned = nudged(base, DOWN, 0.5)
    one, two = sharded(base, 2), sharded(tuned, 2)
    hub.add_repo("org/base", one | {"config.json": CONFIG})
    hub.add_repo("org/tuned", two | {"config.json": CONFIG})
    cli("add", "org/base"), cli("add", "org/tuned")
    (changed,) = [name for name in one if name.endswith(".safetensors") and one[name] != two[name]]
    hub.reset()
    found = cli.told("compare", "org/base", "org/tuned")
    assert (found["unlike"], found["only_a"], found["only_b"]) == ([], [], [])
    assert {r.path.rpartition("/")[2] for r in hub.requests if r.sent and "safetensors" in r.path} == {changed}
    assert len(found["equal"]) + len(found["compared"]) == len(base)
    (different,) = [t for t in found["compared"] if not t["equal"]]
    moved = abs(float(tuned[DOWN].reshape(-1)[17]) - float(base[DOWN].reshape(-1)[17]))
    assert (different["name"], different["dtype"], different["max_diff"]) == (DOWN, "F32", moved)
    assert different["size"] - 4 <= different["equal_bytes"] < different["size"]
    assert 0.999 < different["cosine"] < 1

    hub.reset()
    again = cli.told("compare", "org/base", "org/tuned")
    assert hub.sent() == 0
    assert [t["name"] for t in again["compared"]] == [DOWN]
    assert {t["name"] for t in found["compared"] if t["equal"]} < set(again["equal"])


def test_one_tensor_fetches_its_own_ranges_only(cli: Inside, hub: Hub) -> None:
    base = {f"t{i}": tensor(i, 2000, 500) for i in range(6)}
    hub.add_repo("org/a", {"model.safetensors": single(base)})
    hub.add_repo("org/b", {"model.safetensors": single(nudged(nudged(base, "t2", 1.0), "t5", 1.0))})
    cli("add", "org/a"), cli("add", "org/b")
    hub.reset()
    (found,) = cli.told("compare", "org/a", "org/b", "--tensor", "t2")["compared"]
    assert (found["name"], found["equal"]) == ("t2", False)
    assert hub.sent("org/a/*") == hub.sent("org/b/*") == base["t2"].nbytes
    like = cli.told("compare", "org/a", "org/b", "--tensor", "t[25]")
    assert [t["name"] for t in like["compared"]] == ["t2", "t5"]
    assert "no tensor t9 in either" in cli("compare", "org/a", "org/b", "--tensor", "t9", code=2)


def test_words_for_people(cli: Inside, hub: Hub) -> None:
    a = {"same": tensor(1, 2000), "off": tensor(2, 10), "nan": tensor(3, 10), "shape": tensor(4, 10), "a": tensor(5, 4)}
    b = a | {"off": a["off"] + np.float32(2), "nan": a["nan"].copy(), "shape": tensor(4, 5, 2), "b": tensor(6, 4)}
    b["nan"][3] = np.nan
    del b["a"]
    hub.add_repo("org/a", {"model.safetensors": single(a)})
    hub.add_repo("org/b", {"model.safetensors": single(b)})
    cli("add", "org/a"), cli("add", "org/b")
    said = cli("compare", "org/a", "org/b").splitlines()
    assert said[0].split()[:2] == ["TENSOR", "DTYPE"]
    rows = {line.split()[0]: line for line in said[1:3]}
    assert rows.keys() == {"nan", "off"}
    assert rows["off"].endswith("  2") or " 2" in rows["off"]
    assert "shape: F32 [10] in org/a, F32 [5, 2] in org/b" in said
    assert "nan: 1 element NaN or infinite, 1 of them not the same" in said
    assert {"only in org/a: a", "only in org/b: b"} <= set(said)
    assert said[-1].startswith("1 tensor equal, 2 different; ")
    assert cli("compare", "org/a", "org/b", "-q").split() == ["nan", "off"]


def test_weights_in_a_directory_of_their_own(cli: Inside, hub: Hub) -> None:
    hub.add_repo("org/a", {"unet/model.safetensors": single({"x": tensor(1, 10), "y": tensor(2, 10)})})
    hub.add_repo("org/b", {"unet/model.safetensors": single({"x": tensor(1, 10), "y": tensor(3, 10)})})
    cli("add", "org/a"), cli("add", "org/b")
    assert [t["name"] for t in cli.told("compare", "org/a", "org/b")["compared"] if not t["equal"]] == ["y"]


def test_a_model_with_itself_reads_nothing(cli: Inside, hub: Hub) -> None:
    hub.add_repo("org/a", {"model.safetensors": single(llama(2)), "config.json": CONFIG})
    cli("add", "org/a")
    cli("slice", "org/a", "--layers", "0", "--as", "part")
    hub.reset()
    found = cli.told("compare", "org/a", "part")
    assert (len(found["equal"]), found["compared"], found["only_b"]) == (3, [], [])
    assert hub.sent() == 0


def test_what_cannot_be_compared(cli: Inside, hub: Hub) -> None:
    hub.add_repo("org/a", {"model.safetensors": single({"x": tensor(1, 500_000)})})
    hub.add_repo("org/b", {"model.safetensors": single({"x": tensor(2, 500_000)})})
    hub.add_repo("org/text", {"config.json": CONFIG})
    cli("add", "org/a"), cli("add", "org/b"), cli("add", "org/text")
    assert "org/text has no tensors" in cli("compare", "org/a", "org/text", code=2)
    assert "no model 'org/c'" in cli("compare", "org/a", "org/c", code=2)
    assert "offline" in cli("--offline", "compare", "org/a", "org/b", code=13)
