"""`add --substitute`: only on what was compared, only within the bound, and said wherever one looks."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from cakefs.model import SpanKey
from cakefs.plan.substitute import build_substituted
from cakefs.store.distances import Distance
from cakefs.store.store import Store
from tests.hub import Hub
from tests.inside import Inside
from tests.models import CONFIG, llama, sharded, single
from tests.mounts import Cakefs, needs_fuse
from tests.shelf import Shelf

NEAR, FAR, NAN = (f"model.layers.{i}.mlp.down_proj.weight" for i in range(3))
BASE = llama(3, width=512)
TUNED: dict[str, Any] = {name: value.copy() for name, value in BASE.items()}
TUNED[NEAR].reshape(-1)[5] += np.float32(0.25)
TUNED[FAR].reshape(-1)[5] += np.float32(8)
TUNED[NAN].reshape(-1)[5] = np.nan


@pytest.fixture
def cli(tmp_path: Path, hub: Hub) -> Inside:
    cli = Inside(tmp_path, hub)
    hub.add_repo("org/base", {"model.safetensors": single(BASE), "config.json": CONFIG})
    hub.add_repo("org/tuned", sharded(TUNED, 2) | {"config.json": CONFIG, "notes.txt": b"mine"})
    cli("add", "org/base"), cli("add", "org/tuned")
    return cli


def test_only_what_was_compared_and_is_near(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    options = ("--substitute", "org/base", "--max-diff", "0.5")
    assert "is known to be within" in cli("add", "org/tuned", "--as", "near", *options, code=2)
    cli("compare", "org/base", "org/tuned")
    cli("rm", "org/tuned"), cli("gc")

    hub.reset()
    done = cli.told("add", "org/tuned", "--as", "near", *options)
    assert done["substituted"].keys() == {NEAR}
    assert 0 < done["substituted"][NEAR] <= 0.5
    assert (done["substituted_bytes"], done["never_compared"]) == (BASE[NEAR].nbytes, 0)
    assert hub.sent() < 70_000, "headers and small files"
    assert cli("add", "org/tuned", "--as", "near", *options).startswith("unchanged near, NOT as published")

    hub.reset()
    cli("export", "near", tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == TUNED.keys()
    for name, value in found.items():
        expected = BASE if name == NEAR else TUNED
        assert value.tobytes() == expected[name].tobytes()
    assert (tmp_path / "out/notes.txt").read_bytes() == b"mine"
    assert sum(r.sent for r in hub.requests if "tuned" in r.path) < sum(t.nbytes for t in TUNED.values()) * 0.95


def test_it_is_said_wherever_one_looks(cli: Inside, tmp_path: Path) -> None:
    cli("compare", "org/tuned", "org/base")  # either way round
    cli("add", "org/tuned", "--as", "near", "--substitute", "org/base", "--max-diff", "0.5")
    words = f"1 of {len(BASE)} tensors are those of org/base, max |a - b| <= 0.5"
    cli("pull", "near"), cli("pull", "org/base"), cli("pull", "org/tuned")
    (listed,) = (m for m in cli.told("ls") if m["name"] == "near")
    assert (listed["substituted"], listed["complete"], listed["verified"]) == (words, True, False)
    (line,) = (row for row in cli("ls").splitlines() if row.startswith("near "))
    assert line.endswith("complete, substituted")
    assert all(m["verified"] and not m["substituted"] for m in cli.told("ls") if m["name"] != "near")
    assert f"SUBSTITUTED: {words}" in cli("show", "near")
    shown = cli.told("show", "near")
    assert shown["substituted"] == words and shown["origin"].endswith("with tensors of org/base")
    assert {o["model"] for layer in shown["stack"] for o in layer["origins"]} == {"org/tuned", "org/base"}

    cli("export", "near", tmp_path / "out", "--file", "model.safetensors")
    with safe_open(tmp_path / "out", "np") as file:
        metadata = file.metadata()
    said = json.loads(metadata["cakefs.substituted"])
    assert metadata["format"] == "pt"
    assert (said["model"], said["max_diff"], list(said["tensors"])) == ("org/base", 0.5, [NEAR])
    for refused in (("slice", "near", "--layers", "0"), ("merge", "near", "--repeat-map", "0,0")):
        assert "is not what was published" in cli(*refused, "--as", "part", code=2)


def test_what_is_asked_for_wrongly(cli: Inside) -> None:
    cli("compare", "org/base", "org/tuned")
    near = ("add", "org/tuned", "--as", "near")
    assert "belong together" in cli(*near, "--substitute", "org/base", code=2)
    assert "belong together" in cli(*near, "--max-diff", "1", code=2)
    for bound in ("-1", "nan", "inf"):
        assert "is no bound" in cli(*near, "--substitute", "org/base", f"--max-diff={bound}", code=2)
    assert "within 0.1 of" in cli(*near, "--substitute", "org/base", "--max-diff", "0.1", code=2)
    assert "no model 'org/none'" in cli(*near, "--substitute", "org/none", "--max-diff", "1", code=2)
    taken = cli("add", "org/tuned", "--substitute", "org/base", "--max-diff", "1", code=2)
    assert "org/tuned is already here" in taken
    assert {m["name"] for m in cli.told("ls")} == {"org/base", "org/tuned"}
    done = cli.told("add", "org/tuned", "--substitute", "org/base", "--max-diff", "100", "--update")
    assert done["substituted"].keys() == {NEAR, FAR}, "never one with a NaN that the other has not"


def test_spans_are_counted_in_the_order_of_the_tensors() -> None:
    """Counted otherwise, what an earlier cakefs made would not be known as the same."""
    shelf, shapes = Shelf(), {f"model.layers.{i}.w": ("F32", (8,)) for i in range(4)}
    own, donor = (shelf.model(f"org/{name}", shapes, None) for name in ("own", "donor"))
    near = {"model.layers.1.w": 0.1, "model.layers.2.w": 0.1}
    made = build_substituted(own, donor, near, 0.5, name="near", created=1, put_literal=shelf.put)
    urls = [made.sources[span.source].locator.url for span in made.spans]
    assert [url.split("/")[-2] for url in urls] == ["own", "donor", "donor", "own"]


def test_a_refuted_file_takes_its_comparisons_along(tmp_path: Path) -> None:
    a, b, c = (SpanKey(f"sha256:{i}", 0, 8) for i in "abc")
    with Store.open(tmp_path / "store") as store:
        known = store.catalog.distances
        known.record([(a, b, Distance(False, 0.5, 0)), (b, c, Distance(False, 3, 1))])
        assert known.of(a, b) == known.of(b, a) == Distance(False, 0.5, 0)
        assert known.of(c, b) == Distance(False, 3, 1)
        assert known.of(a, c) is None
        known.forget("sha256:a")
        assert (known.of(a, b), known.of(b, a), known.of(b, c)) == (None, None, Distance(False, 3, 1))


@needs_fuse
def test_the_mount_says_so(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    cli("compare", "org/base", "org/tuned")
    cli("add", "org/tuned", "--substitute", "org/base", "--max-diff", "0.5", "--update")
    cakefs = Cakefs(tmp_path, hub.endpoint)
    with cakefs.mounted() as mountpoint:
        path = mountpoint / "org/tuned/model.safetensors"
        assert b"those of org/base" in os.getxattr(path, "user.cakefs.substituted")
        assert os.getxattr(path, "user.cakefs.verified") == b"no"
        assert "user.cakefs.substituted" not in os.listxattr(mountpoint / "org/base/model.safetensors")
        shutil.copyfile(path, tmp_path / "copy")
        hidden = mountpoint / ".cakefs"
        assert not list(hidden.glob("original/org/tuned/*")) and not list(hidden.glob("hub/*tuned*"))
    found = load_file(tmp_path / "copy")
    assert found[NEAR].tobytes() == BASE[NEAR].tobytes() and found[FAR].tobytes() == TUNED[FAR].tobytes()
