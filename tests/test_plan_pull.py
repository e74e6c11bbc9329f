"""`cakefs plan` is what `cakefs pull` does: by laws for the pure part, by the server's log for the whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.cli.sizes import human_time, parse_rate
from cakefs.engine.known.survey import find_model
from cakefs.errors import UserError
from cakefs.model import CHUNK, File, Locator, Manifest, Source, Span, SpanKey
from cakefs.plan.pullplan import Held, plan_pull
from cakefs.plan.requests import BATCH_CHUNKS, ChunkRef, chunks_size, pull_requests, span_chunks
from cakefs.store.store import Store
from tests.hub import Hub
from tests.inside import Inside
from tests.models import CONFIG, llama, sharded, single, tensor
from tests.test_plan_requests import all_chunks, manifest

WEIGHTS = "model.safetensors"


# The requests


@given(st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=12), st.integers(1, 3), st.data())
def test_the_requests_of_a_pull_cover_what_is_missing_and_not_a_byte_more(
    sizes: list[int], sources: int, data: st.DataObject
) -> None:
    m = manifest(*sizes, sources=sources)
    refs = data.draw(st.sets(st.sampled_from(all_chunks(m)), max_size=20))
    missing = [[ref for ref in span_chunks(i, 0, span.size) if ref in refs] for i, span in enumerate(m.spans)]
    wanted = sorted(
        (m.spans[r.span].source, m.spans[r.span].start + r.chunk * CHUNK, chunks_size(m, [r])) for r in refs
    )
    asked = list(pull_requests(m, missing))
    assert len(asked) == len(set(asked))
    covered = set()
    for request in asked:
        inside = [w for w in wanted if w[0] == request.source and request.start <= w[1] < request.stop]
        assert inside[0][1] == request.start and inside[-1][1] + inside[-1][2] == request.stop
        assert sum(size for _, _, size in inside) == request.stop - request.start
        assert covered.isdisjoint(inside)
        covered.update(inside)
    assert covered == set(wanted)


def test_a_pull_of_many_small_tensors_is_cut_into_batches_and_covers_them_all() -> None:
    m = manifest(*[10] * (BATCH_CHUNKS + 5))
    asked = list(pull_requests(m, ([ChunkRef(i, 0)] for i in range(len(m.spans)))))
    assert [(r.start, r.stop) for r in asked] == [(0, 10 * BATCH_CHUNKS), (10 * BATCH_CHUNKS, 10 * (BATCH_CHUNKS + 5))]


# What is spared


def files(sizes: list[list[int]], kinds: list[str]) -> Manifest:
    """A file of each list of span sizes, named by a hash of that kind."""
    named = enumerate(zip(sizes, kinds, strict=True))
    sources = tuple(Source(f"f{i}", f"{kind}:{i:064}", Locator("x", sum(s))) for i, (s, kind) in named)
    spans = [Span(i, sum(s[:n]), sum(s[: n + 1])) for i, s in enumerate(sizes) for n in range(len(s))]
    return Manifest("a/b", "", "", "", 0, sources, tuple(spans), (), tuple[File, ...]())


@given(st.data())
def test_only_what_a_published_hash_can_decide_is_spared(data: st.DataObject) -> None:
    shape = st.lists(st.lists(st.sampled_from([4, 8]), min_size=1, max_size=5), min_size=1, max_size=3)
    sizes = data.draw(shape)
    kinds = data.draw(st.lists(st.sampled_from(["sha256", "git", "etag"]), min_size=len(sizes), max_size=len(sizes)))
    m = files(sizes, kinds)
    everything = list(range(len(m.spans)))
    left = sorted(data.draw(st.sets(st.sampled_from(everything))))
    others = data.draw(st.sets(st.sampled_from(everything)))
    sealed: dict[str, list[tuple[int, int]]] = {source.identity: [] for source in m.sources}
    for span in others - set(left):
        sealed[m.key(span).identity].append((m.spans[span].start, m.spans[span].stop))
    claims = {m.key(i): data.draw(st.sampled_from(["aa", "bb", "cc"])) for i in everything if data.draw(st.booleans())}
    held = {"aa": Held("xxh3:aa", data.draw(st.sampled_from([4, 8])))}
    plan = plan_pull(m, left, sealed, claims, held)

    assert sorted([*plan.fetch, *(one.span for one in plan.spared)]) == left
    assert list(plan.fetch) == sorted(plan.fetch)
    complete = {
        i for i, s in enumerate(sizes) if {n for n in everything if m.spans[n].source == i} <= others | set(left)
    }
    for one in plan.spared:
        span = m.spans[one.span]
        assert kinds[span.source] == "sha256" and span.source in complete
        assert claims[m.key(one.span)] == one.sha256
        if one.digest:
            assert held[one.sha256] == (one.digest, span.size)
        else:
            copies = [i for i in plan.fetch if claims.get(m.key(i)) == one.sha256 and m.spans[i].size == span.size]
            assert copies and copies[0] < one.span
    nothing = plan_pull(m, left, sealed, {}, held)
    assert (list(nothing.fetch), nothing.spared) == (left, ())


# By the server's log


class Planned(Inside):
    def publish(self, name: str, files: Mapping[str, bytes]) -> None:
        self.hub.add_repo(name, files, lfs=lambda path, size: path.endswith(".safetensors"))

    def proved(self, name: str, *choice: str) -> dict[str, Any]:
        """The plan, after a pull that made exactly its requests."""
        self.hub.reset()
        planned: dict[str, Any] = self.told("plan", name, *choice)
        assert self.hub.requests == []
        self.call("pull", name, *choice)
        asked = sorted((r.path.split("/", 2)[2], r.range) for r in self.hub.requests if r.stage == "cdn")
        expected = sorted((r["path"], f"bytes={r['start']}-{r['stop'] - 1}") for r in planned["requests"])
        assert asked == expected
        assert sum(r["stop"] - r["start"] for r in planned["requests"]) == planned["bytes"]["missing"]
        assert sum(r.sent for r in self.hub.requests if r.stage == "cdn") == planned["bytes"]["missing"]
        return planned


@pytest.fixture
def planned(hub: Hub, tmp_path: Path) -> Planned:
    return Planned(tmp_path, hub)


def large() -> dict[str, Any]:
    """Tensors larger than a request, and small ones between."""
    return {f"t{i}": tensor(i, size // 4) for i, size in enumerate((5 * CHUNK + 40, 1000, 9 * CHUNK, 40, 3 * CHUNK))}


def test_the_ranges_printed_are_the_ranges_requested(planned: Planned) -> None:
    """Also where a part is here, and where an earlier transfer said how fast the line is."""
    planned.publish("org/big", {WEIGHTS: single(large())})
    planned.call("add", "org/big")
    with Store.open(planned.store) as store:
        m = find_model(store, "org/big")
        spans = sorted((span.size, i) for i, span in enumerate(m.spans))
        key, data = m.key(spans[-1][1]), single(large())
        for chunk in (0, 4):
            start = key.start + chunk * CHUNK
            store.write_chunk(key, chunk, data[start : start + CHUNK])
    plan = planned.proved("org/big")
    assert plan["seconds"] is None and len(plan["requests"]) > 4
    assert plan["bytes"]["local"] >= 2 * CHUNK
    again = planned.told("plan", "org/big")
    assert again["requests"] == [] and again["bytes"]["missing"] == 0 and again["seconds"] == 0


def test_shards_are_planned_by_the_files_that_are_published(planned: Planned) -> None:
    planned.publish("org/shards", sharded(llama(4), 3) | {"config.json": CONFIG})
    planned.call("add", "org/shards")
    plan = planned.proved("org/shards")
    assert {r["path"] for r in plan["requests"]} == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert plan["bytes"]["shared"] == 0


def test_some_layers_are_planned_and_pulled_alone(planned: Planned) -> None:
    planned.publish("org/name", {WEIGHTS: single(llama(6))})
    planned.call("add", "org/name")
    plan = planned.proved("org/name", "--layers", "1-2,4")
    (layers,) = plan["layers"]
    assert (layers["prefix"], layers["picture"], [cell["layer"] for cell in layers["layers"]]) == (
        "model.layers",
        "░░░",
        [1, 2, 4],
    )
    assert {t["name"].split(".")[2] for t in plan["tensors"]} == {"1", "2", "4"}
    assert planned.told("plan", "org/name")["layers"][0]["picture"] == "░██░█░"
    rest = planned.proved("org/name", "--files", "*.safetensors")
    assert rest["layers"][0]["picture"] == "░██░█░"
    assert "layer 9 is not in org/name" in planned.call("plan", "org/name", "--layers", "9", code=2)[1]
    assert "give one of them" in planned.call("plan", "org/name", "--layers", "1", "--files", "x", code=2)[1]
    assert "no file of org/name is like x" in planned.call("plan", "org/name", "--files", "x", code=2)[1]


def test_what_another_model_has_is_told_by_its_name(planned: Planned) -> None:
    """The same shard in two repositories is known before a byte is fetched."""
    base, tune = llama(4), llama(4)
    name = next(n for n in sorted(tune) if "layers.3" in n)
    tune[name] = tune[name] + 1
    planned.publish("org/base", sharded(base, 2))
    planned.publish("org/tune", sharded(tune, 2))
    planned.call("add", "org/base")
    planned.call("pull", "org/base")
    planned.call("add", "org/tune")
    plan = planned.proved("org/tune")
    shared = {t["same_as"] for t in plan["tensors"] if t["state"] == "shared"}
    assert shared == {"org/base"} and plan["bytes"]["shared"] > 0
    assert {r["path"] for r in plan["requests"]} <= {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    text = planned.call("plan", "org/tune")[0]
    assert "here, and in org/base" in text and "a pull fetches nothing" in text


def test_a_model_that_was_never_added_is_planned_by_its_headers(planned: Planned) -> None:
    planned.publish("org/new", {WEIGHTS: single(llama(4)), "config.json": CONFIG})
    plan = planned.told("plan", "org/new")
    assert plan["layers"][0]["picture"] == "░░░░"
    assert planned.told("ls") == []
    planned.call("add", "org/new")
    assert planned.proved("org/new")["requests"] == plan["requests"]
    assert "org/no not found" in planned.call("plan", "org/no", code=10)[1]
    assert "no model 'org/no' here" in planned.call("plan", "org/no", "--offline", code=2)[1]


def test_a_view_is_planned_by_what_it_is_made_of(planned: Planned) -> None:
    config = json.dumps({"model_type": "llama", "num_hidden_layers": 4, "tie_word_embeddings": True}).encode()
    planned.publish("org/name", {WEIGHTS: single(llama(4)), "config.json": config})
    planned.call("add", "org/name")
    planned.call("slice", "org/name", "--layers", "1-2", "--as", "part")
    whole, part = planned.told("plan", "org/name"), planned.proved("part")
    assert part["layers"][0]["picture"] == "░░"
    assert 0 < part["bytes"]["missing"] < whole["bytes"]["missing"]
    assert planned.told("plan", "org/name")["layers"][0]["picture"] == "░██░"
    assert planned.told("diff", "part", "org/name")["equal"]["tensors"] == 6


def test_the_time_is_that_of_the_last_long_transfer_or_not_known(planned: Planned) -> None:
    planned.publish("org/big", {WEIGHTS: single({f"t{i}": tensor(i, CHUNK) for i in range(5)})})
    planned.publish("org/other", {WEIGHTS: single({"t": tensor(9, CHUNK)})})
    for name in ("org/big", "org/other"):
        planned.call("add", name)
    assert "not known" in planned.call("plan", "org/big")[0]
    assert "2 min at 200 kB/s" in planned.call("plan", "org/big", "--rate", "200kB/s")[0]
    planned.call("pull", "org/big")
    plan = planned.told("plan", "org/other")
    assert plan["rate"] > 0 and plan["seconds"] == pytest.approx(plan["bytes"]["missing"] / plan["rate"])
    assert "as the last time" in planned.call("plan", "org/other")[0]


def test_rates_and_times_in_words() -> None:
    assert [parse_rate(text) for text in ("50MB", "1.5 MiB/s", "800k")] == [50_000_000, 1_572_864, 800_000]
    for text in ("fast", "0", "-1", "1 MB/h"):
        with pytest.raises(UserError):
            parse_rate(text)
    assert [human_time(s) for s in (0.2, 40.4, 600, 12_000)] == ["under 1 s", "40 s", "10 min", "3 h 20 min"]


def test_names_alone_for_scripts(planned: Planned) -> None:
    """--quiet: of a plan what is missing, of a diff what is not equal."""
    tune = llama(2)
    tune["model.norm.weight"] = tune["model.norm.weight"] + 1
    planned.publish("org/base", {WEIGHTS: single(llama(2))})
    planned.publish("org/tune", {WEIGHTS: single(tune)})
    for name in ("org/base", "org/tune"):
        planned.call("add", name)
    assert len(planned.call("plan", "org/base", "-q")[0].splitlines()) == 8
    for name in ("org/base", "org/tune"):
        planned.call("pull", name)
    assert planned.call("plan", "org/base", "-q")[0] == ""
    assert planned.call("diff", "org/base", "org/tune", "-q")[0] == "model.norm.weight\n"
    text = planned.call("diff", "org/base", "org/tune")[0]
    assert "model.layers 0-1  ██\n" in text and "different        1" in text
    assert "model.norm.weight" in planned.call("diff", "org/base", "org/tune", "--tensors")[0]


def test_the_same_file_twice_in_a_repository_is_fetched_once(planned: Planned) -> None:
    file = single(llama(2))
    planned.publish("org/twice", {WEIGHTS: file, f"copy/{WEIGHTS}": file})
    planned.call("add", "org/twice")
    plan = planned.proved("org/twice")
    assert plan["bytes"]["missing"] < len(file)
    with Store.open(planned.store) as store:
        m = find_model(store, "org/twice")
        assert all(store.has(SpanKey(*m.key(i))) for i, span in enumerate(m.spans) if span.size)
