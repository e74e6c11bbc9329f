"""Slices and merges as a user makes them: commands over a real hub, and what a real mount serves of them.

Commands that only look at the store run within this process, which saves the imports of a new one.
"""

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from cakefs.formats.safetensors import TensorSpec, build_header, canonical_key, parse_header, tensor_size
from cakefs.store.store import Store
from tests.hub import Hub
from tests.hub.content import Content
from tests.inside import Inside
from tests.models import llama, sharded, single, tensor
from tests.mounts import needs_fuse, write_config
from tests.shelf import LLAMA, Shelf, qwen_4bit
from tests.shelf import llama as llama_shapes
from tests.test_loaders import offline

WEIGHTS = "model.safetensors"
Tensors = Mapping[str, NDArray[Any]]


class Views(Inside):
    """A store with models in it."""

    def stack(self, name: str) -> list[tuple[str, int]]:
        """Model and layer that each layer comes from."""
        stack = self.told("show", name)["stack"]
        assert [entry["layer"] for entry in stack] == sorted(entry["layer"] for entry in stack)
        return [(origin["model"], origin["layer"]) for entry in stack for origin in entry["origins"]]

    def names(self) -> set[str]:
        return {model["name"] for model in self.told("ls")}

    def publish(self, name: str, tensors: Tensors, *, shards: int = 0, **config: object) -> None:
        """Puts a llama on the hub and adds it."""
        layers = 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("model.layers."))
        said = json.dumps({**LLAMA, "tie_word_embeddings": True, "num_hidden_layers": layers, **config}).encode()
        files = sharded(tensors, shards) if shards else {WEIGHTS: single(tensors)}
        self.hub.add_repo(name, {**files, "config.json": said, "tokenizer.json": b"{}", "README.md": b"# card"})
        self.call("add", name, "--update")

    def recipe(self, text: str) -> Path:
        path = self.store.parent / "recipe.yml"
        path.write_text(text)
        return path


@pytest.fixture
def views(tmp_path: Path, hub: Hub) -> Views:
    return Views(tmp_path, hub)


def restacked(layers: list[tuple[Tensors, int]], outside: Tensors) -> dict[str, NDArray[Any]]:
    """What a merge of these layers consists of."""
    found = {n: t for n, t in outside.items() if not n.startswith("model.layers.")}
    for number, (model, layer) in enumerate(layers):
        at = f"model.layers.{layer}."
        found |= {f"model.layers.{number}.{n[len(at) :]}": t for n, t in model.items() if n.startswith(at)}
    return found


def only(tensors: Tensors, *layers: int) -> dict[str, NDArray[Any]]:
    return {n: t for n, t in tensors.items() if n.startswith(tuple(f"model.layers.{i}." for i in layers))}


def nbytes(tensors: Tensors) -> int:
    return sum(t.nbytes for t in tensors.values())


def passthrough(*slices: tuple[str, int, int], extra: str = "") -> str:
    parts = "".join(f"- sources: [{{model: {m}, layer_range: [{a}, {b}]}}]\n" for m, a, b in slices)
    return f"merge_method: passthrough\n{extra}slices:\n{parts}"


# --- slices ---------------------------------------------------------------------------------------------------------


@needs_fuse
def test_a_slice_fetches_its_own_ranges_only(views: Views) -> None:
    """Of a single file and of shards over which each layer is spread."""
    tensors = llama(12, width=128)
    views.publish("org/single", tensors)
    views.publish("org/sharded", tensors | {"model.extra": tensor(9, 3)}, shards=3)
    with views.mounted() as mountpoint:
        for name in ("single", "sharded"):
            views.hub.reset()
            made = views.told("slice", f"org/{name}", "--layers", "1,3", "--as", f"of-{name}")
            assert views.hub.requests == []
            assert (made["layers"], made["tensors"], made["changed"], made["warnings"]) == (2, 6, True, [])
            there = mountpoint / f"of-{name}"
            assert sorted(p.name for p in there.iterdir()) == ["config.json", WEIGHTS, "tokenizer.json"]
            assert (there / WEIGHTS).read_bytes() == single(only(tensors, 1, 3))
            assert json.loads((there / "config.json").read_text())["num_hidden_layers"] == 12
            assert views.hub.sent("*.safetensors") == nbytes(only(tensors, 1, 3))
    listed = {m["name"]: m for m in json.loads(views.call("ls", "--json")[0])}
    assert listed["of-single"]["complete"] and listed["of-single"]["local_bytes"] == listed["of-single"]["size"]
    assert listed["of-sharded"]["complete"]


@needs_fuse
def test_two_layers_of_a_4_bit_qwen_are_250_mib_of_4_gib(
    views: Views, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = sorted((TensorSpec(n, *shape) for n, shape in qwen_4bit().items()), key=canonical_key)
    path = tmp_path / "qwen.safetensors"
    write_sparse(path, specs)
    genuine = Content._digest
    monkeypatch.setattr(Content, "_digest", lambda c, a, p: "5" * 64 if c.size > 1 << 30 else genuine(c, a, p))
    config = json.dumps({"model_type": "qwen2", "num_hidden_layers": 28}).encode()
    views.hub.add_repo("mlx/qwen", {WEIGHTS: path, "config.json": config})
    views.call("add", "mlx/qwen")
    views.hub.reset()
    made = views.told("slice", "mlx/qwen", "--layers", "0-1", "--as", "worker-a")
    assert made["tensors"] == 52 and abs(made["size"] - 262_229_627) < 4096
    with views.mounted() as mountpoint, (mountpoint / "worker-a" / WEIGHTS).open("rb") as file:
        header = parse_header(file.read(10_000), made["size"], WEIGHTS)
        for entry in header.entries:
            file.seek(header.size + entry.start)
            assert file.read(16) == marker(entry.name)
        file.seek(0)
        while file.read(1 << 20):
            pass
        assert views.hub.sent() == 262_223_872
    shutil.rmtree(views.store / "blobs")  # a quarter of a GB that pytest would keep


def marker(name: str) -> bytes:
    return hashlib.md5(name.encode(), usedforsecurity=False).digest()


def write_sparse(path: Path, specs: list[TensorSpec]) -> None:
    """A file whose tensors are their markers and zeros."""
    header = build_header(specs, {"format": "pt"}, path.name)
    with path.open("wb") as file:
        file.write(header)
        at = len(header)
        for spec in specs:
            file.seek(at)
            file.write(marker(spec.name))
            at += tensor_size(spec.dtype, spec.shape)
        file.truncate(at)
    assert path.stat().st_blocks * 512 < 8_000_000


def test_a_bad_slice_is_one_error_and_no_model(views: Views) -> None:
    views.publish("org/name", llama(2))
    refused(views, "slice", "org/name", "--layers", "7", said="layer 7 is not in org/name")
    for layers in ("3-1", "", "0,x", "-1"):
        assert "there is: model.layers.{0-1}" in refused(views, "slice", "org/name", "--layers", layers, said=layers)
    err = refused(views, "slice", "org/name", "--layers", "0", "--prefix", "blocks", said="blocks")
    assert "model.layers (layers 0-1)" in err
    refused(views, "slice", "org/nothing", "--layers", "0", said="org/nothing")
    refused(views, "slice", "org/name@v9", "--layers", "0", said="org/name@v9")


def test_a_model_is_named_with_its_revision_everywhere(views: Views) -> None:
    views.publish("org/name", llama(2, width=8))
    revision = views.told("show", "org/name")["revision"]
    for i, model in enumerate(("org/name@main", f"org/name@{revision}", f"org/name@{revision[:8]}")):
        views.call("slice", model, "--layers", "1", "--as", f"slice-{i}")
        views.call("merge", model, "--repeat-map", "1", "--as", f"merge-{i}")
        assert views.stack(f"slice-{i}") == views.stack(f"merge-{i}") == [("org/name", 1)]


def refused(views: Views, *arguments: object, said: str) -> str:
    """The one error, after which there is no more than before."""
    before = views.names()
    out, err = views.call(*arguments, "--as", "bad", code=2)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in line and out == "" and views.names() == before
    assert all(other == line or other.startswith("hint: ") for other in err.splitlines())
    return err


# --- merges ---------------------------------------------------------------------------------------------------------


@needs_fuse
def test_a_repeat_map_serves_the_layers_again(views: Views) -> None:
    tensors = llama(4, width=128)
    views.publish("org/name", tensors)
    views.hub.reset()
    made = views.told("merge", "org/name", "--repeat-map", "0,1,2,1,2,3", "--as", "me/longer")
    assert views.hub.requests == [] and made["new_bytes"] < 10_000 and made["layers"] == 6
    expected = restacked([(tensors, i) for i in (0, 1, 2, 1, 2, 3)], tensors)
    with views.mounted() as mountpoint:
        assert (mountpoint / "me/longer" / WEIGHTS).read_bytes() == single(expected)
        assert json.loads((mountpoint / "me/longer/config.json").read_text())["num_hidden_layers"] == 6
        assert views.hub.sent(WEIGHTS) == nbytes(tensors)


README_1 = ("0:.3,.2:.4,.4:.5,.4:1", 10, [0, 1, 2, 3, 2, 3, 4, 4, 5, 4, 5, 6, 7, 8, 9])
README_2 = ("0:.5,.3:.8,.5:1", 7, [0, 1, 2, 3, 2, 3, 4, 5, 3, 4, 5, 6])


@pytest.mark.parametrize(("ratios", "depth", "layers"), [README_1, README_2])
def test_ratios_as_david_documents_them(views: Views, ratios: str, depth: int, layers: list[int]) -> None:
    views.publish("org/name", llama(depth, width=8))
    views.call("merge", "org/name", "--ratio-repeat", ratios, "--as", "by-flag")
    views.call("merge", views.recipe(f"model: org/name\nratio_repeat: '{ratios}'\n"), "--as", "by-recipe")
    assert views.stack("by-flag") == views.stack("by-recipe") == [("org/name", i) for i in layers]


def test_ratios_as_david_ships_them(views: Views) -> None:
    views.publish("org/name", llama(10, width=8))
    views.call("merge", "org/name", "--ratio-repeat", README_1[0], "--mode", "david-code", "--as", "a")
    recipe = views.recipe(f"model: org/name\nmode: david-code\nratio_repeat: '{README_1[0]}'\n")
    views.call("merge", recipe, "--as", "b")
    shipped = [0, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    assert views.stack("a") == views.stack("b") == [("org/name", i) for i in shipped]


@needs_fuse
def test_two_models_stacked_scaled_and_averaged(views: Views) -> None:
    a, b = llama(4, seed=1), llama(4, seed=2)
    untied = {"tie_word_embeddings": False}
    head = {"lm_head.weight": tensor(77, 64, 96)}
    views.publish("org/a", a | head, **untied)
    views.publish("org/b", b | head, **untied)
    views.call("merge", views.recipe(passthrough(("org/a", 0, 3), ("org/b@main", 1, 4))), "--as", "stacked")
    scaled = "merge_method: passthrough\nmodels: [{model: org/a, parameters: {scale: 0.3}}]\n"
    views.call("merge", views.recipe(scaled), "--as", "scaled")
    linear = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: org/a}, {model: org/b}]\n"
    views.call("merge", views.recipe(linear), "--as", "mean")
    with views.mounted() as mountpoint:
        outside = a | {"model.norm.weight": b["model.norm.weight"]} | head
        layers = [(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]
        assert (mountpoint / "stacked" / WEIGHTS).read_bytes() == single(restacked(layers, outside))  # type: ignore[arg-type]
        served = load((mountpoint / "scaled" / WEIGHTS).read_bytes())
        assert all((served[n] == t * np.float32(0.3)).all() for n, t in (a | head).items())
        served = load(read_in_pieces(mountpoint / "mean" / WEIGHTS))
        assert served.keys() == (a | head).keys()
        for name, one in a.items():
            mean = one.astype(np.float64) * 0.5 + b[name].astype(np.float64) * 0.5
            assert (served[name] == mean.astype(np.float32)).all()
    shown = views.told("show", "mean", "--tensors")["tensors"]
    assert [t["digest"] for t in shown if "layers" in t["name"]] == [""] * 12
    assert {t["name"]: t["size"] for t in shown} == {n: t.nbytes for n, t in (a | head).items()}
    listed = {m["name"]: m for m in json.loads(views.call("ls", "--json")[0])}
    assert all(m["complete"] and m["local_bytes"] == m["size"] for m in listed.values())
    assert nbytes(a | head) <= listed["mean"]["shared_bytes"] <= listed["mean"]["size"]  # of itself, not of both inputs
    assert "here, and in org/a, org/b\n" in views("plan", "mean"), "each of them has a part"


def read_in_pieces(path: Path) -> bytes:
    """In pieces that fit no element, last first."""
    size, step = path.stat().st_size, 77_777
    pieces = []
    fd = os.open(path, os.O_RDONLY)
    try:
        for offset in reversed(range(0, size, step)):
            pieces.append(os.pread(fd, step, offset))
    finally:
        os.close(fd)
    return b"".join(reversed(pieces))


@needs_fuse
def test_views_of_views_and_their_parents_removed_and_updated_under_the_mount(views: Views) -> None:
    """Removing or updating what a view was made from changes no byte of it, fetched before or after."""
    tensors = llama(6, width=128)
    views.publish("org/name", tensors)
    views.call("slice", "org/name", "--layers", "0-2", "--renumber", "--with-embeddings", "--with-head", "--as", "low")
    views.call("merge", views.recipe(passthrough(("low", 0, 3), ("org/name", 2, 6))), "--as", "joined")
    views.call("merge", "joined", "--repeat-map", "0,5,5,6", "--as", "again")
    views.call("slice", "again", "--layers", "1-2", "--as", "part")
    assert views.stack("part") == [("org/name", 4), ("org/name", 4)]
    again = single(restacked([(tensors, i) for i in (0, 4, 4, 5)], tensors))
    part = single({f"model.layers.{k}.{n[15:]}": t for k in (1, 2) for n, t in only(tensors, 4).items()})
    with views.mounted() as mountpoint, (mountpoint / "again" / WEIGHTS).open("rb") as held:
        assert held.read(100_000) == again[:100_000]
        views.publish("org/name", llama(6, seed=5, width=128))  # a new commit, and `add --update`
        views.call("rm", "org/name", "low", "joined")
        views.call("gc")
        assert views.names() == {"again", "part"}
        held.seek(0)
        assert held.read() == again
        assert (mountpoint / "part" / WEIGHTS).read_bytes() == part
    views.call("gc")
    with views.mounted("--offline") as mountpoint:
        assert (mountpoint / "again" / WEIGHTS).read_bytes() == again


@needs_fuse
def test_a_layer_that_is_shown_three_times_is_fetched_once(views: Views, tmp_path: Path) -> None:
    tensors = llama(12, width=512)
    views.publish("org/name", tensors)
    views.call("merge", "org/name", "--repeat-map", "0,1,2,3,4,5,6,5,6,7,6,7,8,9,10,11", "--as", "v")
    views.hub.reset()
    settings = write_config(tmp_path, readahead="false")
    with views.mounted(CAKEFS_CONFIG=settings) as mountpoint, (mountpoint / "v" / WEIGHTS).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # whole pages, but not the kernel's own readahead
        header = parse_header(os.pread(file.fileno(), 20_000, 0), os.fstat(file.fileno()).st_size, WEIGHTS)
        for layer in (6, 8, 10):
            for entry in (e for e in header.entries if e.name.startswith(f"model.layers.{layer}.")):
                data = os.pread(file.fileno(), entry.size, header.size + entry.start)
                assert data == tensors[entry.name.replace(f".{layer}.", ".6.", 1)].tobytes()
    published = single(tensors)
    source = parse_header(published, len(published), WEIGHTS)
    wanted = [(e.start, e.stop) for e in source.entries if e.name.startswith("model.layers.6.")]
    once = sum(fetched(views.hub, start + source.size, stop + source.size) for start, stop in wanted)
    assert once == nbytes(only(tensors, 6))
    edges = 6 << 20  # The pages that the copies share with their neighbours, a chunk each.
    assert views.hub.sent(WEIGHTS) <= nbytes(only(tensors, 6)) + edges < nbytes(tensors) / 4


def fetched(hub: Hub, start: int, stop: int) -> int:
    """How many bytes were sent out of `[start, stop)` of the weights, counted as often as they were sent."""
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", r.range) for r in hub.requests if r.stage == "cdn"]
    return sum(max(0, min(stop, int(m[2]) + 1) - max(start, int(m[1]))) for m in ranges if m)


def test_a_70b_of_137_layers_costs_a_header(views: Views) -> None:
    shapes = llama_shapes(80, width=8192, vocabulary=32_000)
    for i in range(80):
        for name in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
            shapes = {**shapes, f"model.layers.{i}.{name}.weight": ("BF16", (8192, 8192))}
        shapes = {**shapes, f"model.layers.{i}.post_attention_layernorm.weight": ("BF16", (8192,))}
    config = {**LLAMA, "num_hidden_layers": 80}
    shelf = Shelf()
    manifest = shelf.hollow("org/70b", shapes, config)
    with Store.open(views.store) as store:
        span = next(i for i, s in enumerate(manifest.sources) if s.path == "config.json")
        (key,) = [manifest.key(i) for i, s in enumerate(manifest.spans) if s.source == span]
        store.put_span(key, json.dumps(config).encode())
        store.catalog.models.put(manifest)
    before = disk_usage(views.store)
    started = time.process_time()
    layers = ",".join(str(i) for i in [*range(60), *range(3, 80)])
    made = views.told("merge", "org/70b", "--repeat-map", layers, "--as", "137")
    assert time.process_time() - started < 1  # 0.1 when nothing is wrong
    assert made["layers"] == 137 and made["size"] > 100_000_000_000
    assert made["new_bytes"] < 2_000_000 and disk_usage(views.store) - before < 2_000_000
    assert len(views.stack("137")) == 137


def disk_usage(directory: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in directory.rglob("*") if p.is_file())


def test_a_tower_that_two_models_share_is_known_once_it_is_here(views: Views) -> None:
    tower = {"vision_tower.layers.0.w": tensor(99, 40, 40)}
    for name, seed in (("a", 1), ("b", 2)):
        views.publish(f"org/{name}", llama(2, seed=seed) | tower)
    recipe = views.recipe(passthrough(("org/a", 0, 1), ("org/b", 1, 2)))
    assert "cakefs pull org/a" in refused(views, "merge", recipe, said="not known to be the same in org/a and org/b")
    for name in ("a", "b"):
        views.call("pull", f"org/{name}")
    views.call("merge", recipe, "--as", "both")
    assert views.stack("both") == [("org/a", 0), ("org/b", 1)]


BAD = {
    "index N": ("model: org/name\nrepeat_map_raw: [0, 4]\n", "repeat_map_raw[1]"),
    "negative": ("model: org/name\nrepeat_map_raw: [0, -1]\n", "repeat_map_raw[1]"),
    "empty": ("model: org/name\nrepeat_map_raw: []\n", "repeat_map_raw"),
    "text": ("model: org/name\nrepeat_map_raw: [0, '3']\n", "repeat_map_raw[1]"),
    "fraction": ("model: org/name\nrepeat_map_raw: [2.5]\n", "repeat_map_raw[0]"),
    "ratio 1.2": ("model: org/name\nratio_repeat: [[0, 1.2]]\n", "ratio_repeat[0]"),
    "backwards ratio": ("model: org/name\nratio_repeat: '0:.5,.8:.3'\n", "ratio_repeat[1]"),
    "nan": ("model: org/name\nratio_repeat: [[0, .nan]]\n", "ratio_repeat[0]"),
    "misspelt": ("modle: org/name\nratio_repeat: '0:1'\n", "modle"),
    "misspelt parameter": (
        "merge_method: passthrough\nmodels: [{model: org/name, parameters: {scael: 1}}]\n",
        "models[0].parameters.scael",
    ),
    "reversed range": (passthrough(("org/name", 3, 1)), "slices[0].sources[0].layer_range"),
    "past the end": (passthrough(("org/name", 0, 2), ("org/name", 1, 5)), "slices[1].sources[0].layer_range"),
    "sizes": (passthrough(("org/name", 0, 2), ("org/wide", 1, 3)), "slices[1].sources[0].model"),
    "tied with untied": (passthrough(("org/name", 0, 2), ("org/untied", 1, 3)), "tie"),
    "unknown model": (passthrough(("org/name", 0, 2), ("org/nothing", 1, 3)), "slices[1].sources[0].model"),
    "not a recipe": ("just words\n", "recipe"),
    "a list of methods": (
        "merge_method: [passthrough]\nmodels: [{model: org/name}]\n",
        "merge_method: ['passthrough']",
    ),
    "another method": ("merge_method: dare_ties\nmodels: [{model: org/name}]\n", "merge_method"),
}


def test_each_bad_recipe_is_one_error_and_no_model(views: Views) -> None:
    views.publish("org/name", llama(4))
    views.publish("org/wide", llama(4, width=64), hidden_size=64)
    views.publish("org/untied", llama(4) | {"lm_head.weight": tensor(5, 64, 96)}, tie_word_embeddings=False)
    for case, (text, said) in BAD.items():
        err = refused(views, "merge", views.recipe(text), said=said)
        assert case != "unknown model" or "hint: cakefs add org/nothing" in err


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--repeat-map", "0,9", "repeat_map_raw[1]"),
        ("--repeat-map", "0,x", "repeat_map_raw[1]"),
        ("--repeat-map", "", "repeat_map_raw is empty"),
        ("--ratio-repeat", "0:1.2", "ratio_repeat[0]"),
        ("--ratio-repeat", "nan:1", "ratio_repeat[0]"),
        ("--mode", "david-code", "--ratio-repeat"),
    ],
)
def test_bad_flags_of_merge_name_their_entry(views: Views, flag: str, value: str, said: str) -> None:
    views.publish("org/name", llama(2, width=8))
    assert refused(views, "merge", "org/name", flag, value, said=said).startswith("error: ")


def test_a_recipe_that_is_no_file_or_no_text(views: Views, tmp_path: Path) -> None:
    views.publish("org/name", llama(2, width=8))
    assert "--repeat-map" in refused(views, "merge", "org/name", said="no recipe org/name")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused(views, "merge", tmp_path / "binary", said="is no text")
    refused(views, "merge", tmp_path, said="cannot read")
    (tmp_path / "long").write_bytes(b"#" * 2_000_000)
    refused(views, "merge", tmp_path / "long", said="too long")


# --- names and looks ------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_needs_update(views: Views) -> None:
    views.publish("org/name", llama(4, width=8))
    make: Callable[..., tuple[str, str]] = lambda layers, *more, code=0: views.call(  # noqa: E731
        "slice", "org/name", "--layers", layers, "--as", "v", *more, code=code
    )
    assert make("0")[0].startswith("made v: 1 layer, 3 tensors")
    assert make("0")[0].startswith("unchanged v")
    assert "v is already here, from layer 0 of org/name" in make("1", code=2)[1]
    assert make("1", "--update")[0].startswith("made v") and views.stack("v") == [("org/name", 1)]
    assert "--update" in views.call("slice", "org/name", "--layers", "1", "--as", "org/name", code=2)[1]
    for bad in ("../x", ".x", "a//b", "/etc"):
        assert "bad model name" in views.call("slice", "org/name", "--layers", "1", "--as", bad, code=2)[1]
    hidden = views.call("slice", "org/name", "--layers", "1", "--as", "org/name/config.json", code=2)[1]
    assert "would be hidden by a file of org/name" in hidden
    views.call("slice", "org/name", "--layers", "1", "--as", "org/name/part")
    assert views.names() == {"org/name", "org/name/part", "v"}


def test_a_config_that_is_gone_is_said_and_pulled_again(views: Views) -> None:
    views.publish("org/name", llama(2, width=8))
    with Store.open(views.store) as store:
        manifest = store.catalog.models.manifest(store.catalog.models.all()["org/name"].manifest)
        for i, span in enumerate(manifest.spans):
            if manifest.sources[span.source].path == "config.json":
                store.drop_span(manifest.key(i))
    err = refused(views, "slice", "org/name", "--layers", "0", said="config.json of org/name is not in the store")
    assert "hint: cakefs pull org/name --files config.json" in err
    views.call("pull", "org/name", "--files", "config.json")
    views.call("slice", "org/name", "--layers", "0", "--as", "v")


def test_show_draws_the_stack(views: Views) -> None:
    views.publish("org/name", llama(4, width=8))
    views.call("merge", "org/name", "--repeat-map", "0,1,2,1,2,3", "--as", "v")
    lines = views.call("show", "v")[0].splitlines()
    at = lines.index("LAYER  FROM")
    assert lines[at + 1 : at + 3] == ["0-2    org/name 0-2  █▓▓·", "3-5    org/name 1-3  ·▓▓█"]
    assert [entry["repeated"] for entry in views.told("show", "v")["stack"]] == [False, True, True, True, True, False]
    assert views.told("show", "org/name")["stack"] == []
    assert "LAYER" not in views.call("show", "org/name")[0]
    mean = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: org/name}, {model: org/other}]\n"
    views.publish("org/other", llama(4, seed=1, width=8))
    views.call("merge", views.recipe(mean), "--as", "mean")
    assert "0-3    org/name 0-3 + org/other 0-3 (linear)  ████" in views.call("show", "mean")[0]
    views.call("slice", "v", "--layers", "3-4", "--as", "w")
    assert "3-4    org/name 1-2  ·██" in views.call("show", "w")[0]


def test_repeated_layers_are_coloured_on_a_terminal_only(views: Views) -> None:
    views.publish("org/name", llama(4, width=8))
    views.call("merge", "org/name", "--repeat-map", "0,1,1", "--as", "v")
    command = [sys.executable, "-m", "cakefs", "show", "v"]
    for no_colour, expected in (("", True), ("1", False)):
        reader, writer = pty.openpty()
        environment = views.environment | {"TERM": "xterm", **({"NO_COLOR": no_colour} if no_colour else {})}
        done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=60)
        os.close(writer)
        shown = os.read(reader, 65536).decode()
        os.close(reader)
        assert done.returncode == 0 and "▓" in shown and ("\x1b[1;33m▓" in shown) is expected


# --- loaders --------------------------------------------------------------------------------------------------------

# One process for all: importing transformers takes longer than anything that is tested here.
COMPARE = """
import copy, json, sys, torch, transformers
made = sys.argv[1]
sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=300)
for family, kind, more in (("llama", "single", {}), ("qwen3", "sharded", {"head_dim": 16})):
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(family, num_hidden_layers=4, **sizes, **more)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(f"{made}/{family}", max_shard_size="5GB" if kind == "single" else "100KB")
print("made", flush=True)
mounted, cases = json.loads(input())
load = transformers.AutoModelForCausalLM.from_pretrained
for name, (family, layers) in cases.items():
    served, stack = load(f"{mounted}/{name}"), load(f"{made}/{family}")
    own = stack.model.layers
    stack.model.layers = torch.nn.ModuleList(copy.deepcopy(own[i]) for i in layers)
    for position, layer in enumerate(stack.model.layers):
        layer.self_attn.layer_idx = position
    stack.config.num_hidden_layers = len(layers)
    if getattr(stack.config, "layer_types", None):
        stack.config.layer_types = [stack.config.layer_types[i] for i in layers]
    assert served.config.num_hidden_layers == len(served.model.layers) == len(layers), name
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(served(ids).logits, stack(ids).logits), name
print("logits equal")
"""


@needs_fuse
@pytest.mark.loaders
@pytest.mark.timeout(300)
def test_served_views_load_in_transformers_with_the_logits_of_a_stack_in_memory(views: Views, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    made, log = tmp_path / "made", tmp_path / "loader.log"
    command = [sys.executable, "-W", "ignore", "-c", COMPARE, str(made)]
    cases: dict[str, tuple[str, list[int]]] = {}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=offline(), text=True
        ) as loader,
    ):
        assert loader.stdin is not None and loader.stdout is not None
        assert loader.stdout.readline() == "made\n", log.read_text()
        for family in ("llama", "qwen3"):
            views.hub.add_repo(f"acme/{family}", made / family)
            views.call("add", f"acme/{family}")
            whole = ("--renumber", "--with-embeddings", "--with-head")
            views.call("slice", f"acme/{family}", "--layers", "1-2", *whole, "--as", f"{family}-slice")
            views.call("merge", f"acme/{family}", "--repeat-map", "0,1,2,1,2,3", "--as", f"{family}-merge")
            cases |= {f"{family}-slice": (family, [1, 2]), f"{family}-merge": (family, [0, 1, 2, 1, 2, 3])}
        assert (made / "qwen3/model.safetensors.index.json").exists()
        with views.mounted() as mountpoint:
            said, _ = loader.communicate(json.dumps([str(mountpoint), cases]) + "\n", timeout=250)
        assert said == "logits equal\n", log.read_text()
