"""The promise of cake: from hashes to the ranges that are missing, by the server's log; and no lie becomes a byte.

The scenario is that of the original's README, with numbers from runs; its faults are tests of their own.
"""

import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cakefs.engine.known import claims
from cakefs.engine.known.survey import find_model
from cakefs.engine.local import stream
from cakefs.formats.safetensors import TensorSpec, build_header, canonical_key, parse_header, tensor_size
from cakefs.model import MIB, Extent, Literal, SpanKey, View
from cakefs.plan.choice import file_spans
from cakefs.store.store import Store
from tests.hub import Hub
from tests.inside import Inside

WEIGHTS = "model.safetensors"
WIDTH, LAYERS, VOCABULARY = 32, 4, 64
Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]


def noise(seed: str, size: int) -> bytes:
    return hashlib.shake_256(seed.encode()).digest(size)


def base(*, vocabulary: int = VOCABULARY, dtype: str = "BF16", prefix: str = "model") -> dict[str, Any]:
    """45,376 bytes of tensors; the norms of the four layers are equal."""

    def tensor(name: str, *shape: int) -> tuple[str, tuple[int, ...], bytes]:
        seed = "norm" if name.endswith("input_layernorm.weight") else name
        return dtype, shape, noise(seed, tensor_size("BF16", shape))

    shapes = {"embed_tokens": (VOCABULARY, WIDTH), "norm": (WIDTH,)}
    for i in range(LAYERS):
        at = f"layers.{i}"
        shapes |= {
            f"{at}.input_layernorm": (WIDTH,),
            f"{at}.mlp.down_proj": (WIDTH, 48),
            f"{at}.mlp.up_proj": (48, WIDTH),
            f"{at}.self_attn.k_proj": (16, WIDTH),
            f"{at}.self_attn.q_proj": (WIDTH, WIDTH),
        }
    named = {f"{prefix}.{name}.weight": tensor(f"{name}.weight", *shape) for name, shape in shapes.items()}
    return named | {"lm_head.weight": tensor(f"lm_head.{vocabulary}", vocabulary, WIDTH)}


def changed(tensors: Tensors, *parts: str) -> dict[str, Any]:
    """The tensors with one of these in their name have other bytes."""
    return {
        name: (dtype, shape, noise(f"other {name}", len(data)) if any(p in name for p in parts) else data)
        for name, (dtype, shape, data) in tensors.items()
    }


def one_bit() -> dict[str, Any]:
    tensors = base()
    name = "model.layers.1.mlp.up_proj.weight"
    dtype, shape, data = tensors[name]
    return tensors | {name: (dtype, shape, data[:1000] + bytes([data[1000] ^ 0x40]) + data[1001:])}


def safetensors(tensors: Tensors, metadata: Mapping[str, str] = {"format": "pt"}) -> bytes:
    specs = sorted((TensorSpec(n, dtype, shape) for n, (dtype, shape, _) in tensors.items()), key=canonical_key)
    return build_header(specs, dict(metadata), WEIGHTS) + b"".join(tensors[spec.name][2] for spec in specs)


def data_start(file: bytes) -> int:
    return 8 + int.from_bytes(file[:8], "little")


def hashes_of(file: bytes) -> dict[str, dict[str, Any]]:
    """hashes.json of a single file, as the reference describes it."""
    begin = data_start(file)
    return {
        e.name: {
            "data_offsets": [e.start, e.stop],
            "file_name": WEIGHTS,
            "hash": hashlib.sha256(file[begin + e.start : begin + e.stop]).hexdigest(),
            "size": e.stop - e.start,
        }
        for e in parse_header(file, len(file), WEIGHTS).entries
    }


class Cake(Inside):
    """A store, and a hub that keeps a log."""

    def publish(self, name: str, file: bytes, claims: object = None) -> None:
        """On the hub and added; with what a hashes.json says of it."""
        self.hub.add_repo(name, {WEIGHTS: file}, lfs=lambda path, size: True)
        self.call("add", name)
        if claims is not None:
            self.claim(name, claims)

    def claim(self, name: str, claims: object, code: int = 0) -> tuple[str, str]:
        path = self.directory / "hashes.json"
        path.write_text(json.dumps(claims))
        return self.call("hashes", "--import", path, name, code=code)

    def pull(self, name: str, *arguments: str) -> list[str]:
        """The ranges that were requested for it."""
        self.hub.reset()
        self.call("pull", name, *arguments)
        asked = [r for r in self.hub.requests if r.stage in ("cdn", "plain")]
        assert all(r.status == 206 for r in asked)
        return [r.range for r in asked]

    def served(self, name: str) -> bytes:
        """The file as a mount would show it, with the network cut off."""
        with Store.open(self.store) as store:
            manifest, buffer = find_model(store, name), memoryview(bytearray(MIB))
            pieces = []
            for segment in manifest.shown(View.MODEL)[WEIGHTS].segments:
                if isinstance(segment, Literal):
                    pieces.append(store.literal(segment.blob))
                elif segment.size:
                    assert isinstance(segment, Extent)
                    pieces += [bytes(p) for p in stream(store, manifest.key(segment.span), buffer)]
            return b"".join(pieces)


@pytest.fixture
def cake(hub: Hub, tmp_path: Path) -> Cake:
    return Cake(tmp_path, hub)


def sizes(ranges: list[str]) -> int:
    """Bytes that ranges as a server sees them ask for."""
    bounds = (map(int, r.removeprefix("bytes=").split("-")) for r in ranges)
    return sum(stop - start + 1 for start, stop in bounds)


BASE = safetensors(base())
LONGER = {"format": "pt", "note": "x" * (408 - len(',"note":""'))}
EMPTY = {"model.empty.weight": ("BF16", (0, WIDTH), b"")}
SCENARIO: dict[str, tuple[bytes, int, list[str] | None]] = {
    "base-again": (BASE, 0, []),
    "top-two-layers": (
        safetensors(changed(base(), "2.mlp", "2.self_attn", "3.mlp", "3.self_attn")),
        18_432,
        ["bytes=29112-38327", "bytes=38392-47607"],
    ),
    "one-bit": (safetensors(one_bit()), 3_072, ["bytes=22904-25975"]),
    "same-bytes-other-header": (safetensors(base(), LONGER), 0, []),
    "renamed": (safetensors(base(prefix="transformer.h")), 0, []),
    "other-dtype-same-bytes": (safetensors(base(dtype="F16")), 0, []),
    "no-metadata": (safetensors(base(), {}), 0, []),
    "bigger-vocab": (safetensors(base(vocabulary=72)), 4_608, None),
    "zero-size": (safetensors(base() | EMPTY), 0, []),
}


def test_the_scenario_of_cake_by_the_servers_log(cake: Cake) -> None:
    """Each fetches what it alone has, each equals its source byte for byte, and `plan` said so before."""
    assert len(BASE) - data_start(BASE) == 45_376 and data_start(BASE) == 2_296
    cake.publish("org/base", BASE, hashes_of(BASE))
    assert sizes(cake.pull("org/base")) == 45_184
    assert cake.served("org/base") == BASE
    for name, (file, expected, ranges) in SCENARIO.items():
        model = f"org/{name}"
        cake.publish(model, file, hashes_of(file))
        planned = cake.told("plan", model)
        asked = cake.pull(model)
        assert sizes(asked) == expected, name
        assert ranges is None or sorted(asked) == ranges, name
        assert sorted(f"bytes={r['start']}-{r['stop'] - 1}" for r in planned["requests"]) == sorted(asked)
        assert planned["bytes"]["missing"] == expected
        assert cake.served(model) == file, name
    assert all(model["verified"] for model in cake.told("ls"))
    moved = data_start(SCENARIO["same-bytes-other-header"][0]) - data_start(BASE)
    assert moved == 408


def test_without_a_source_of_hashes_everything_is_fetched_once_and_stored_once(cake: Cake) -> None:
    cake.publish("org/base", BASE)
    assert sizes(cake.pull("org/base")) == 45_376
    cake.publish("org/other", safetensors(base(), LONGER))
    assert sizes(cake.pull("org/other")) == 45_376
    with Store.open(cake.store) as store:
        tensors = {d for k, d in store.catalog.listing() if k.start and k.identity.startswith("sha256:")}
        assert sum(size for digest, size, _ in store.catalog.blobs() if digest in tensors) == 45_184


# What somebody claims


def lies(file: bytes, truth: bytes) -> dict[str, dict[str, Any]]:
    """Says of a file that its tensors have the hashes of another file's."""
    other = hashes_of(truth)
    return {name: entry | {"hash": other[name]["hash"]} for name, entry in hashes_of(file).items()}


def test_a_lying_manifest_never_puts_a_wrong_byte_under_a_name(cake: Cake) -> None:
    """All it costs is time: the file's published SHA-256 refutes it, and everything is fetched."""
    tune = safetensors(changed(base(), "layers"))
    cake.publish("org/base", BASE)
    cake.pull("org/base")
    cake.publish("org/tune", tune, lies(tune, BASE))
    with Store.open(cake.store) as store:
        identity = f"sha256:{hashlib.sha256(tune).hexdigest()}"
        assert set(store.catalog.spans(identity)) == {(0, data_start(tune))}
    assert cake.told("plan", "org/tune")["bytes"]["claimed"] == 45_376
    assert sizes(cake.pull("org/tune")) == 45_376
    assert cake.served("org/tune") == tune
    assert cake.told("plan", "org/tune")["bytes"]["claimed"] == 0
    assert cake.served("org/base") == BASE
    assert [m["verified"] for m in cake.told("ls")] == [True, True]


def test_one_lie_among_truths_is_found_out_and_the_log_says_so(cake: Cake) -> None:
    tune = safetensors(changed(base(), "1.mlp.up_proj"))
    false = hashes_of(tune)
    name = "model.layers.1.mlp.up_proj.weight"
    false[name]["hash"] = hashes_of(BASE)[name]["hash"]
    cake.publish("org/base", BASE)
    cake.pull("org/base")
    cake.publish("org/tune", tune, false)
    said = cake.call("pull", "org/tune")[1]
    assert "model.safetensors: what is claimed of its tensors is wrong" in said
    assert cake.served("org/tune") == tune


def test_a_lie_that_two_tensors_of_one_file_are_equal_is_found_out(cake: Cake) -> None:
    file = safetensors(base())
    false = hashes_of(file)
    down, up = (f"model.layers.0.mlp.{x}_proj.weight" for x in ("down", "up"))
    false[up]["hash"] = false[down]["hash"]
    cake.publish("org/base", file, false)
    asked = cake.pull("org/base")
    assert sizes(asked) == 45_376
    assert cake.served("org/base") == file


def test_a_lie_about_a_hash_that_nothing_has_is_found_out(cake: Cake) -> None:
    """What came does not have the claimed hash, of which a copy was spared."""
    false = hashes_of(BASE)
    for i in range(LAYERS):
        false[f"model.layers.{i}.input_layernorm.weight"]["hash"] = "ab" * 32
    cake.publish("org/base", BASE, false)
    assert sizes(cake.pull("org/base")) == 45_376
    assert cake.served("org/base") == BASE


@pytest.mark.parametrize("truth", [True, False])
def test_where_no_published_hash_can_decide_a_claim_is_not_used(cake: Cake, truth: bool) -> None:
    tune = safetensors(changed(base(), "layers.2"))
    cake.publish("org/base", BASE, hashes_of(BASE))
    cake.pull("org/base")
    url = cake.hub.plain(f"some/{WEIGHTS}", tune)
    cake.call("add", url, "--as", "plain")
    said = cake.claim("plain", hashes_of(tune) if truth else lies(tune, BASE))
    assert "no published SHA-256" in said[1]
    assert sizes(cake.pull("plain")) == 45_376
    assert cake.served("plain") == tune


@pytest.mark.parametrize("truth", [True, False])
def test_a_part_of_a_file_cannot_be_proved_and_is_fetched(cake: Cake, truth: bool) -> None:
    tune = safetensors(changed(base(), "lm_head"))
    cake.publish("org/base", BASE, hashes_of(BASE))
    cake.pull("org/base")
    cake.publish("org/tune", tune, hashes_of(tune) if truth else lies(tune, BASE))
    assert sizes(cake.pull("org/tune", "--layers", "0-1")) == 2 * (9_216 + 64)
    assert sizes(cake.pull("org/tune")) == (4_096 if truth else 45_376 - 2 * 9_280)
    assert cake.served("org/tune") == tune


def test_nothing_is_bound_when_a_blob_goes_away_before_the_proof(cake: Cake) -> None:
    same = safetensors(base(), LONGER)
    cake.publish("org/base", BASE, hashes_of(BASE))
    cake.pull("org/base")
    cake.publish("org/same", same, hashes_of(same))
    with Store.open(cake.store) as store:
        manifest = find_model(store, "org/same")
        spans = file_spans(manifest, manifest.files)
        left = [span for span in spans if not store.has(manifest.key(span))]
        planned = claims.plan(store, manifest, left)
        assert planned.fetch == () and len(planned.spared) == len(left)
        store.catalog.drop_blobs([planned.spared[3].digest])
        claims.settle(store, manifest, planned)
        assert not any(store.has(manifest.key(span)) for span in left)
    assert sizes(cake.pull("org/same")) > 0
    assert cake.served("org/same") == same


def test_what_a_killed_pull_left_unproved_is_proved_by_the_next_without_a_transfer(
    cake: Cake, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = SCENARIO["top-two-layers"][0]
    cake.publish("org/base", BASE, hashes_of(BASE))
    cake.pull("org/base")
    cake.publish("org/tune", tune, hashes_of(tune))
    with monkeypatch.context() as context:
        context.setattr(claims, "settle", kill)
        cake.call("pull", "org/tune", code=130)
    assert cake.told("plan", "org/tune")["bytes"]["claimed"] == 45_376 - 18_432
    assert cake.pull("org/tune") == []
    assert cake.served("org/tune") == tune


def test_pulls_of_several_processes_prove_the_same_claims_at_once(cake: Cake) -> None:
    same, tune = SCENARIO["same-bytes-other-header"][0], SCENARIO["one-bit"][0]
    cake.publish("org/base", BASE, hashes_of(BASE))
    cake.pull("org/base")
    cake.publish("org/same", same, hashes_of(same))
    cake.publish("org/tune", tune, hashes_of(tune))
    cake.hub.reset()
    command = [sys.executable, "-m", "cakefs", "pull"]
    pulls = [
        subprocess.Popen([*command, name], env=cake.environment, stdout=subprocess.DEVNULL)
        for name in ("org/same", "org/tune", "org/tune")
    ]
    assert [pull.wait(60) for pull in pulls] == [0, 0, 0]
    assert cake.hub.sent("org/same/*") == 0 and cake.hub.sent("org/tune/*") <= 2 * 3_072
    assert (cake.served("org/same"), cake.served("org/tune")) == (same, tune)
    assert all(model["verified"] for model in cake.told("ls"))


def kill(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_claim_against_what_was_computed_here_is_refused(cake: Cake) -> None:
    cake.publish("org/base", BASE)
    cake.pull("org/base")
    cake.call("hashes", "org/base")
    said = cake.claim("org/base", lies(BASE, safetensors(one_bit())), code=21)[1]
    assert "model.layers.1.mlp.up_proj.weight" in said


def test_claims_go_with_the_last_model_that_they_are_about(cake: Cake) -> None:
    cake.publish("org/base", BASE, hashes_of(BASE))
    identity = f"sha256:{hashlib.sha256(BASE).hexdigest()}"
    with Store.open(cake.store) as store:
        cake.call("gc")
        assert len(store.catalog.sha256.claims(identity)) == 23
        cake.call("rm", "org/base")
        cake.call("gc")
        assert store.catalog.sha256.claims(identity) == {}


# hashes.json


def test_hashes_json_is_that_of_the_reference(cake: Cake) -> None:
    file = safetensors(base() | EMPTY)
    cake.publish("org/base", file)
    said = cake.call("hashes", "org/base", code=2)[1]
    assert "23 of 24 tensors of org/base are not here" in said and "cakefs pull org/base" in said
    cake.pull("org/base")
    assert json.loads(cake.call("hashes", "org/base")[0]) == hashes_of(file)
    cake.hub.down()
    assert json.loads(cake.call("hashes", "org/base", "--offline")[0]) == hashes_of(file)


def test_hashes_of_shards_name_the_published_files(cake: Cake) -> None:
    """Also where a shard begins with a tensor that the index leaves out."""
    tensors = base()
    first = {n: t for n, t in tensors.items() if "layers.0" in n}
    files = {
        "a.safetensors": safetensors(first | {"a.spare": ("BF16", (8,), noise("spare", 16))}),
        "b.safetensors": safetensors({n: t for n, t in tensors.items() if n not in first}),
    }
    weight_map = {n: "a.safetensors" if n in first else "b.safetensors" for n in tensors}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    cake.hub.add_repo("org/shards", {**files, "model.safetensors.index.json": index})
    cake.call("add", "org/shards")
    cake.pull("org/shards")
    expected = {
        name: entry | {"file_name": path}
        for path, file in files.items()
        for name, entry in hashes_of(file).items()
        if name in tensors
    }
    assert json.loads(cake.call("hashes", "org/shards")[0]) == expected


def test_an_export_of_hashes_imports_and_spares_the_transfer(cake: Cake) -> None:
    """Round trip by way of a registry: a static server, as the original has it."""
    same = safetensors(base(), LONGER)
    cake.publish("org/base", BASE)
    cake.pull("org/base")
    cake.publish("org/same", same)
    url = cake.hub.plain("results/org/same/hashes.json", json.dumps(hashes_of(same)).encode())
    said = cake.told("hashes", "--import", url)
    assert said["name"] == "org/same" and said["claims"] == 23
    done = cake.told("pull", "org/same")
    assert (done["fetched_bytes"], done["spared_bytes"], done["verified"]) == (0, 45_376, True)
    assert cake.served("org/same") == same


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda e: e["lm_head.weight"].pop("hash"), "'lm_head.weight' has no hash"),
        (lambda e: e["lm_head.weight"].update(hash="AB" * 32), "not a SHA-256"),
        (lambda e: e["lm_head.weight"].update(size=7), "size 7 is not that of"),
        (lambda e: e["lm_head.weight"].update(data_offsets=[5, 1]), "run backwards"),
        (lambda e: e["lm_head.weight"].update(data_offsets=[0, 1.5]), "not two counts"),
        (lambda e: e["lm_head.weight"].update(file_name="../x"), "no file name"),
        (lambda e: e["lm_head.weight"].update(data_offsets=[8, 4104]), "it is about another revision"),
        (lambda e: e["lm_head.weight"].update(file_name="other.safetensors"), "it is about another revision"),
        (lambda e: e.update({"surprise": e["lm_head.weight"]}), "'surprise' is no tensor of org/base"),
        (lambda e: e.update({"lm_head.weight": 3}), "is no object"),
    ],
)
def test_a_bad_hashes_json_is_one_error_that_names_the_entry(cake: Cake, spoil: Any, said: str) -> None:
    cake.publish("org/base", BASE)
    entries = hashes_of(BASE)
    spoil(entries)
    error = cake.claim("org/base", entries, code=21)[1]
    assert said in error and ("lm_head.weight" in error or "surprise" in error)
    with Store.open(cake.store) as store:
        assert store.catalog.sha256.claims(f"sha256:{hashlib.sha256(BASE).hexdigest()}") == {}


@pytest.mark.parametrize("text", ["[]", "{", '{"a": NaN}', '{"a": {}, "a": {}}', "\ufeff{}", "[" * 100_000])
def test_what_is_no_hashes_json_is_said(cake: Cake, text: str) -> None:
    cake.publish("org/base", BASE)
    path = cake.directory / "hashes.json"
    path.write_text(text)
    assert "is no hashes.json" in cake.call("hashes", "--import", path, "org/base", code=21)[1]


def test_where_a_hashes_json_does_not_say_its_model_one_must(cake: Cake) -> None:
    cake.publish("org/base", BASE)
    path = cake.directory / "hashes.json"
    path.write_text(json.dumps(hashes_of(BASE)))
    assert f"cakefs hashes --import {path} MODEL" in cake.call("hashes", "--import", path, code=2)[1]
    assert "which model?" in cake.call("hashes", code=2)[1]
    assert "no model 'org/no' here" in cake.call("hashes", "--import", path, "org/no", code=2)[1]
    assert "cannot read" in cake.call("hashes", "--import", cake.directory, "org/base", code=2)[1]


# Faults of the original


def test_a_registry_without_the_model_is_an_error_that_says_so(cake: Cake) -> None:
    cake.publish("org/base", BASE)
    url = f"{cake.hub.cdn_endpoint}/plain/results/org/base/hashes.json"
    assert "hashes.json" in cake.call("hashes", "--import", url, code=10)[1]


def test_a_registry_that_hashed_shifted_windows_does_no_harm(cake: Cake) -> None:
    """The original forgot the 8+N bytes of the header, and so do the hashes it published."""
    shifted = hashes_of(BASE)
    for entry in shifted.values():
        start, stop = entry["data_offsets"]
        entry["hash"] = hashlib.sha256(BASE[start:stop]).hexdigest()
    cake.publish("org/base", BASE, shifted)
    cake.pull("org/base")
    assert cake.served("org/base") == BASE


@pytest.mark.parametrize("kind", ["no-range", "short", "wrong-range", "503"])
def test_an_answer_that_is_not_the_range_asked_for_is_never_stored(cake: Cake, kind: str) -> None:
    cake.publish("org/base", BASE, hashes_of(BASE))
    cake.hub.fault(kind, WEIGHTS)
    cake.call("pull", "org/base")
    assert cake.served("org/base") == BASE
    assert json.loads(cake.call("hashes", "org/base")[0]) == hashes_of(BASE)


def test_a_damaged_blob_gets_no_hash(cake: Cake) -> None:
    file = safetensors(base(vocabulary=72))
    cake.publish("org/base", file)
    cake.pull("org/base")
    blobs = [path for path in (cake.store / "blobs").glob("*/*") if path.stat().st_size == 4_608]
    blobs[0].chmod(0o600)
    blobs[0].write_bytes(b"?" + blobs[0].read_bytes()[1:])
    assert "lm_head.weight of org/base is damaged" in cake.call("hashes", "org/base", code=20)[1]


def test_header_keys_in_any_order_are_kept_and_tensors_are_hashed_by_their_offsets(cake: Cake) -> None:
    begin = data_start(BASE)
    table = json.loads(BASE[8:begin])
    text = json.dumps(dict(sorted(table.items(), reverse=True))).encode()
    file = len(text).to_bytes(8, "little") + text + BASE[begin:]
    cake.publish("org/base", file)
    cake.pull("org/base")
    assert cake.served("org/base") == file
    assert json.loads(cake.call("hashes", "org/base")[0]) == hashes_of(file)


def test_no_tensor_is_held_in_memory_to_be_hashed(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        data = noise("x", 32 * MIB)
        store.put_span(SpanKey("sha256:x", 0, len(data)), data)
        ((digest, _, _),) = store.catalog.blobs()
        tracemalloc.start()
        assert claims.learn(store, [digest]) == {digest: hashlib.sha256(data).hexdigest()}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * MIB
