"""GGUF files from `add` to llama.cpp: as published, deduplicated between quantizations, splits merged."""

import hashlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from cakefs.app import App
from cakefs.engine.models import upstream
from cakefs.formats.gguf import HEADER_LIMIT, Header, parse_header
from cakefs.model import MIB, View
from tests import gguf_files
from tests.gguf_files import REFUSED
from tests.hub import Hub
from tests.inline import Inline
from tests.models import CONFIG, llama, single
from tests.mounts import Cakefs, needs_fuse
from tests.test_engine import add, run

SPLIT = Path(__file__).parent / "fixtures" / "gguf_split"  # made by llama.cpp's own gguf-split, merged.gguf too
PARTS = {f"m-{path.name[5:]}": path for path in sorted(SPLIT.glob("part-*.gguf"))}
MODES = ("MMAP", "NONE", "DIRECT_IO")
MODELS = pytest.importorskip("tests.gguf_models", reason="needs the gguf package (the `loaders` extra)")


@pytest.fixture
def cakefs(hub: Hub, tmp_path: Path) -> Cakefs:
    return Inline(tmp_path, hub.endpoint)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as it is, and in two quantizations."""
    pytest.importorskip("xllamacpp", reason="needs llama.cpp (the `loaders` extra)")
    place = tmp_path_factory.mktemp("tiny")
    kinds = {"F32": MODELS.plain, "Q4_K_S": MODELS.small, "Q4_K_M": MODELS.medium}
    return {name: MODELS.write(place / f"tiny-{name}.gguf", choose) for name, choose in kinds.items()}


def parsed(path: Path) -> Header:
    header = parse_header(path.read_bytes(), path.stat().st_size, path.name)
    assert isinstance(header, Header)
    return header


def tensor_hashes(path: Path) -> dict[str, int]:
    """SHA-256 of each tensor with its padding -> its size."""
    data = path.read_bytes()
    pieces = (data[t.start : t.start + t.padded] for t in parsed(path).tensors)
    return {hashlib.sha256(piece).hexdigest(): len(piece) for piece in pieces}


READ = "import gguf, json, sys; print(json.dumps([t.name for t in gguf.GGUFReader(sys.argv[1]).tensors]))"


def read_by_gguf(path: Path) -> list[str]:
    """In a process of its own: a page fault here would keep the hub from answering it."""
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=100, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


# --- as published -----------------------------------------------------------------------------------------------------


@needs_fuse
def test_published_files_are_served_byte_identical_and_read_by_the_gguf_package(
    cakefs: Cakefs, hub: Hub, tiny: dict[str, Path]
) -> None:
    hub.add_repo("org/tiny-GGUF", {path.name: path for path in tiny.values()} | {"config.json": CONFIG})
    added = cakefs.json("add", "org/tiny-GGUF")
    assert added["warnings"] == []
    with cakefs.mounted() as mountpoint:
        for path in tiny.values():
            assert read_by_gguf(mountpoint / "org/tiny-GGUF" / path.name) == [t.name for t in parsed(path).tensors]
            for place in ("org/tiny-GGUF", ".cakefs/original/org/tiny-GGUF"):
                assert (mountpoint / place / path.name).read_bytes() == path.read_bytes()


def test_adding_a_large_vocabulary_takes_few_requests_and_little_more_than_it(
    cakefs: Cakefs, hub: Hub, tmp_path: Path
) -> None:
    """8 MiB of header and 8 of tensor: as long as those of models with 150,000 tokens."""
    tokens = b"".join(gguf_files.text(f"token {i:09}") for i in range(150_000))
    merges = b"".join(gguf_files.text(f"tok en {i:09}") for i in range(200_000))
    pairs = [
        gguf_files.ARCH,
        gguf_files.array("tokenizer.ggml.tokens", gguf_files.STRING, 150_000, tokens),
        gguf_files.array("tokenizer.ggml.token_type", gguf_files.I32, 150_000, bytes(600_000)),
        gguf_files.array("tokenizer.ggml.merges", gguf_files.STRING, 200_000, merges),
    ]
    infos = [gguf_files.info("a", [2 * MIB])]
    one = gguf_files.make(pairs, infos, 8 * MIB)
    other = gguf_files.make(pairs, [gguf_files.info("b", [2 * MIB])], b"\1" * (8 * MIB))
    hub.add_repo("org/name", {"one.gguf": one})
    hub.add_repo("org/other", {"other.gguf": other})
    header = len(one) - 8 * MIB
    assert 8 * MIB < header < HEADER_LIMIT
    added = cakefs.json("add", "org/name")
    looks = [r for r in hub.requests if r.stage == "cdn" and r.sent]
    assert len(looks) <= 4
    assert header <= added["fetched_bytes"] < 1.3 * header
    cakefs.run("add", "org/other")
    assert cakefs.json("status")["store"]["blob_bytes"] < 1.2 * header
    assert cakefs.json("add", "org/name", "--as", "again")["fetched_bytes"] == 0


def vocabulary(name: str, word: str = "token") -> list[bytes]:
    """Keys of a header of 1 MiB, as the quantizations of a model have them in common."""
    words = b"".join(gguf_files.text(f"{word} {i:06}") for i in range(20_000))
    return [
        gguf_files.ARCH,
        gguf_files.pair("general.name", gguf_files.STRING, gguf_files.text(name)),
        gguf_files.array("tokenizer.ggml.tokens", gguf_files.STRING, 20_000, words),
        gguf_files.array("tokenizer.ggml.token_type", gguf_files.I32, 20_000, bytes(80_000)),
        gguf_files.array("tokenizer.ggml.merges", gguf_files.STRING, 20_000, words),
        gguf_files.pair("tokenizer.chat_template", gguf_files.STRING, gguf_files.text("x" * 5000)),
    ]


def quantization(name: str, kind: int, tensors: int = 60, word: str = "token") -> bytes:
    sizes = [64 * (2 if i % 3 else 1 + kind) for i in range(tensors)]
    infos = [gguf_files.info(f"blk.{i}", [size // 4], 0, sum(sizes[:i])) for i, size in enumerate(sizes)]
    return gguf_files.make(vocabulary(name, word), infos, bytes([kind]) * sum(sizes))


def test_the_vocabulary_that_quantizations_share_is_fetched_once(cakefs: Cakefs, hub: Hub) -> None:
    files = {f"q{kind}.gguf": quantization("q" * (kind + 1), kind) for kind in range(5)}
    files["other.gguf"] = quantization(
        "o", 1, word="other"
    )  # is no longer than the rest, and looked at after one of it
    hub.add_repo("org/many", files)
    added = cakefs.json("add", "org/many")
    header = len(files["q0.gguf"])
    assert added["warnings"] == [] and 2 * header < added["fetched_bytes"] < 2.5 * header
    shown = {f["path"]: f["size"] for f in cakefs.json("show", "org/many")["files"]}
    assert shown == {path: len(data) for path, data in files.items()}
    tensors = cakefs.json("show", "org/many", "--tensors")["tensors"]
    assert len(tensors) == 60 * len(files)
    assert cakefs.json("pull", "org/many")["verified"] is True  # every published hash
    assert cakefs.json("status")["store"]["blob_bytes"] < 2.5 * header
    assert cakefs.json("add", "org/many", "--as", "again")["fetched_bytes"] == 0


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [("MOST_TENSORS", 100, "more than 100 tensors"), ("MOST_TOGETHER", 1_200_000, "have 1200000 bytes")],
)
def test_what_all_headers_of_a_model_cost_is_bounded(
    cakefs: Cakefs, hub: Hub, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, reason: str
) -> None:
    monkeypatch.setattr(upstream, limit, value)
    files = {f"{word}.gguf": quantization("m", 1, word=word) for word in ("tokens", "pieces")}
    hub.add_repo("org/large", files)
    (warning,) = cakefs.json("add", "org/large")["warnings"]
    assert "is shown as it is" in warning and reason in warning
    assert cakefs.json("pull", "org/large")["verified"] is True


def test_files_that_are_refused_are_not_kept_in_memory(hub: Hub, tmp_path: Path) -> None:
    bad = gguf_files.make(
        [gguf_files.array("a", gguf_files.U8, 20 * MIB, bytes(20 * MIB)), gguf_files.pair("x", 99, b"")]
    )
    hub.add_repo("org/bad", {f"{i}.gguf": bad + bytes([i]) for i in range(8)})
    held: list[int] = []

    async def body(app: App) -> None:
        tracemalloc.start()
        try:
            await add(app, "org/bad")
            held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()

    run(hub, tmp_path / "store", body)
    assert held[0] < 20 * MIB


def test_headers_that_break_the_format_are_warned_of_and_their_files_shown_as_they_are(
    cakefs: Cakefs, hub: Hub
) -> None:
    """Nothing is refused for them, and each warning names its file and the reason."""
    files = {f"{number:02}.gguf": data for number, (data, _) in enumerate(REFUSED.values()) if data}
    reasons = {f"{number:02}.gguf": reason for number, (data, reason) in enumerate(REFUSED.values()) if data}
    hub.add_repo("org/bad", files | {"model.safetensors": single(llama(1))})
    added = cakefs.json("add", "org/bad")
    warnings = dict(warning.split(" is shown as it is: ", 1) for warning in added["warnings"])
    assert warnings.keys() == files.keys()
    for path, reason in reasons.items():
        assert reason in warnings[path] and path in warnings[path], path
    pulled = cakefs.json("pull", "org/bad")
    assert pulled["verified"] is True
    shown = {file["path"]: file["size"] for file in cakefs.json("show", "org/bad")["files"]}
    assert {path: shown[path] for path in files} == {path: len(data) for path, data in files.items()}


def test_a_gguf_of_a_plain_server(cakefs: Cakefs, hub: Hub, tiny: dict[str, Path]) -> None:
    url = hub.plain("dir/tiny-Q4_K_M.gguf", tiny["Q4_K_M"])
    added = cakefs.json("add", url)
    assert (added["name"], added["size"]) == ("dir/tiny-Q4_K_M", tiny["Q4_K_M"].stat().st_size)
    shown = cakefs.json("show", "dir/tiny-Q4_K_M", "--tensors")
    entries = parsed(tiny["Q4_K_M"]).tensors
    assert [(t["name"], t["dtype"], t["shape"]) for t in shown["tensors"]] == [
        (t.name, t.dtype, list(t.shape)) for t in entries
    ]
    cakefs.run("pull", "dir/tiny-Q4_K_M")
    assert cakefs.json("ls")[0]["complete"] is True


def test_reading_a_header_from_end_to_end_fetches_no_tensor(hub: Hub, tmp_path: Path) -> None:
    """As a reader of metadata does: its long lists are pieces of their own, but no tensors."""
    words = b"".join(gguf_files.text(f"token {i:06}") for i in range(10_000))
    pairs = [gguf_files.array(f"list.{i}", gguf_files.STRING, 10_000, words) for i in range(6)]
    infos = [gguf_files.info(f"t{i}", [MIB], 0, i * 4 * MIB) for i in range(4)]
    data = gguf_files.make(pairs, infos, 16 * MIB)
    hub.add_repo("org/name", {"x.gguf": data})

    async def body(app: App) -> None:
        await add(app, "org/name")
        async with app.library() as library:
            manifest_id = library.names()["org/name"]
            reader = library.open(manifest_id, library.manifest(manifest_id).shown(View.MODEL)["x.gguf"])
            for offset in range(0, len(data) - 16 * MIB, 65_536):
                size = min(65_536, len(data) - 16 * MIB - offset)
                assert bytes(reader.try_read(offset, size) or b"") == data[offset : offset + size]
            reader.close()
        assert app.fetcher.counters.flights == 0

    run(hub, tmp_path / "store", body)


# --- deduplication ----------------------------------------------------------------------------------------------------


def test_a_second_quantization_stores_only_what_differs(cakefs: Cakefs, hub: Hub, tiny: dict[str, Path]) -> None:
    """Most tensors are quantized alike, and the vocabulary and norms are the same."""
    for name in ("Q4_K_S", "Q4_K_M"):
        hub.add_repo(f"org/{name}", {f"{name}.gguf": tiny[name]})
    small, medium = tensor_hashes(tiny["Q4_K_S"]), tensor_hashes(tiny["Q4_K_M"])
    differing = sum(size for digest, size in medium.items() if digest not in small)
    shared = 1 - differing / sum(medium.values())
    assert 0.6 < shared < 0.9  # published models of 32 layers share 0.83
    stored = []
    for name in ("Q4_K_S", "Q4_K_M"):
        cakefs.run("add", f"org/{name}")
        cakefs.run("pull", f"org/{name}")
        stored.append(cakefs.json("status")["store"]["blob_bytes"])
    assert differing <= stored[1] - stored[0] <= differing + parsed(tiny["Q4_K_M"]).size
    (listed,) = [model for model in cakefs.json("ls") if model["name"] == "org/Q4_K_M"]
    assert listed["verified"] and listed["shared_bytes"] >= sum(medium.values()) - differing


def test_with_its_hashes_known_only_what_differs_is_fetched(hub: Hub, tmp_path: Path, tiny: dict[str, Path]) -> None:
    for name in ("Q4_K_S", "Q4_K_M"):
        hub.add_repo(f"org/{name}", {f"{name}.gguf": tiny[name]})
    elsewhere, here = (Inline(tmp_path / place, hub.endpoint) for place in ("elsewhere", "here"))
    for cakefs in (elsewhere, here):
        (cakefs.store.parent).mkdir()
    elsewhere.run("add", "org/Q4_K_M")
    elsewhere.run("pull", "org/Q4_K_M")
    claims = tmp_path / "hashes.json"
    claims.write_text(elsewhere.run("hashes", "org/Q4_K_M").stdout)
    for name in ("Q4_K_S", "Q4_K_M"):
        here.run("add", f"org/{name}")
    here.run("pull", "org/Q4_K_S")
    here.run("hashes", "--import", str(claims), "org/Q4_K_M")
    small, medium = tensor_hashes(tiny["Q4_K_S"]), tensor_hashes(tiny["Q4_K_M"])
    hub.reset()
    pulled = here.json("pull", "org/Q4_K_M")
    differing = {digest: size for digest, size in medium.items() if digest not in small}
    assert 0 < hub.sent() == pulled["fetched_bytes"] <= sum(differing.values())
    assert pulled["verified"] is True


# --- splits -----------------------------------------------------------------------------------------------------------


@needs_fuse
def test_a_split_is_shown_in_parts_and_merged_as_llama_cpp_merges_it(cakefs: Cakefs, hub: Hub) -> None:
    hub.add_repo("org/split", PARTS)
    cakefs.run("add", "org/split")
    with cakefs.mounted() as mountpoint:
        place = mountpoint / "org/split"
        assert sorted(path.name for path in place.iterdir()) == sorted([*PARTS, "m.gguf"])
        assert (place / "m.gguf").read_bytes() == (SPLIT / "merged.gguf").read_bytes()
        for name, part in PARTS.items():
            assert (place / name).read_bytes() == part.read_bytes()
        assert not (mountpoint / ".cakefs/original/org/split/m.gguf").exists()


def test_parts_that_are_not_of_one_split_are_shown_and_not_merged(cakefs: Cakefs, hub: Hub) -> None:
    first, second, third = PARTS
    mixed = PARTS | {third: PARTS[second]}
    hub.add_repo("org/mixed", mixed)
    (warning,) = cakefs.json("add", "org/mixed")["warnings"]
    assert warning.startswith("the parts of m.gguf are shown, but not merged: ") and "split.no" in warning
    assert {file["path"] for file in cakefs.json("show", "org/mixed")["files"]} == set(mixed)
    hub.add_repo("org/partly", {first: PARTS[first], second: PARTS[second]})
    assert cakefs.json("add", "org/partly")["warnings"] == []
    assert {file["path"] for file in cakefs.json("show", "org/partly")["files"]} == {first, second}


# --- llama.cpp --------------------------------------------------------------------------------------------------------

GENERATE = """
import json, sys, xllamacpp as x
results = {}
for path in json.loads(sys.argv[1]):
    for mode in json.loads(sys.argv[2]):
        p = x.CommonParams()
        p.model.path, p.load_mode = path, getattr(x.llama_load_mode, "LLAMA_LOAD_MODE_" + mode)
        p.n_ctx, p.n_parallel, p.warmup, p.fit_params, p.verbosity = 64, 1, False, False, -1
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
        asked = {"prompt": [1, 270, 265, 273], "n_predict": 12, "temperature": 0, "return_tokens": True}
        answer = x.Server(p).handle_completions(asked | {"ignore_eos": True, "samplers": ["temperature"]})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        results[f"{path} {mode}"] = answer.get("tokens") or answer["choices"][0]["text"]
print("answers " + json.dumps(results))
"""


def generated(*paths: Path) -> dict[str, object]:
    """What llama.cpp makes of each file in each of its ways to load one."""
    command = [sys.executable, "-c", GENERATE, json.dumps([str(p) for p in paths]), json.dumps(MODES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("answers ")]
    return json.loads(line.removeprefix("answers "))  # type: ignore[no-any-return]


@needs_fuse
@pytest.mark.loaders
def test_llama_cpp_generates_the_same_from_the_mount_in_all_load_modes(
    cakefs: Cakefs, hub: Hub, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Mapped, read, and with O_DIRECT; the parts of a split by the first of them, and the merged file beside them."""
    pytest.importorskip("xllamacpp", reason="needs llama.cpp (the `loaders` extra)")
    MODELS.write(tmp_path / "cut.gguf", split_max_tensors=30)
    parts = sorted(tmp_path.glob("cut-*.gguf"))
    assert len(parts) == 3
    hub.add_repo("org/tiny-GGUF", {path.name: path for path in [tiny["F32"], tiny["Q4_K_M"], *parts]})
    cakefs.run("add", "org/tiny-GGUF")
    with cakefs.mounted() as mountpoint:
        place = mountpoint / "org/tiny-GGUF"
        names = [tiny["F32"].name, tiny["Q4_K_M"].name, parts[0].name, "cut.gguf"]
        mounted = generated(*(place / name for name in names))
    direct = generated(tiny["F32"], tiny["Q4_K_M"])
    for kind, shown in (("F32", names[0]), ("Q4_K_M", names[1]), ("F32", parts[0].name), ("F32", "cut.gguf")):
        for mode in MODES:
            answer = mounted[f"{place / shown} {mode}"]
            assert answer and answer == direct[f"{tiny[kind]} {mode}"], (shown, mode)
