"""`model.gguf` of safetensors through a real mount: added, sliced, merged, exported; and run by a real llama.cpp."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cakefs.store.store import Store
from tests.gguf_view_models import CASES, make, saved_again
from tests.gguf_view_record import RECORD
from tests.hub import Hub
from tests.mounts import Cakefs, needs_fuse

RECORDED: dict[str, str] = json.loads(RECORD.read_text())["sha256"]


@pytest.fixture
def cakefs(hub: Hub, tmp_path: Path) -> Cakefs:
    return Cakefs(tmp_path, hub.endpoint)


def add(hub: Hub, cakefs: Cakefs, models: Mapping[str, Mapping[str, bytes]]) -> None:
    for name, files in models.items():
        hub.add_repo(f"org/{name}", files)
    cakefs.add_all([f"org/{name}" for name in models])


def cases(*names: str) -> dict[str, Mapping[str, bytes]]:
    return {name: CASES[name].files for name in names}


@needs_fuse
def test_mount_shows_what_the_converter_writes_from_the_same_blobs(hub: Hub, cakefs: Cakefs) -> None:
    names = ("Llama-3.1-35K-Instruct", "mixtral-bf16", "gemma2-bf16")
    add(hub, cakefs, cases(*names))
    with cakefs.mounted() as mount:
        for name in names:
            assert hashlib.sha256((mount / "org" / name / "model.gguf").read_bytes()).hexdigest() == RECORDED[name]
        hub.reset()
        for name in names:
            assert (mount / "org" / name / "model.safetensors").read_bytes() == CASES[name].files["model.safetensors"]
        assert hub.sent() == 0
    published = sum(len(data) for name in names for data in CASES[name].files.values())
    with Store.open(cakefs.store) as store:
        assert store.usage().blob_bytes < published + 20_000 * len(names)


def test_size_and_export_count_the_weights_once(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    files = CASES["qwen3-bf16"].files
    add(hub, cakefs, {"m": files})
    (listed,) = cakefs.json("ls")
    assert listed["size"] == sum(map(len, files.values()))
    shown = {file["path"]: file["size"] for file in cakefs.json("show", "org/m")["files"]}
    assert shown.keys() == {*files, "model.gguf"} and shown["model.gguf"] > len(files["model.safetensors"])
    cakefs.run("export", "org/m", str(tmp_path / "all"))
    assert {path.name for path in (tmp_path / "all").iterdir()} == files.keys()
    cakefs.run("export", "org/m", str(tmp_path / "one.gguf"), "--file", "model.gguf")
    assert (tmp_path / "one.gguf").stat().st_size == shown["model.gguf"]


def test_large_tokenizer_is_fetched_for_it(hub: Hub, cakefs: Cakefs) -> None:
    large = CASES["qwen2-f32"].files
    large = {**large, "tokenizer.json": large["tokenizer.json"] + b" " * 1_500_000}
    other = {**large, "config.json": large["config.json"].replace(b"Qwen2ForCausalLM", b"SomeForCausalLM")}
    add(hub, cakefs, {"large": large})
    assert hub.sent("tokenizer.json") == len(large["tokenizer.json"])
    hub.reset()
    add(hub, cakefs, {"other": {**other, "tokenizer.json": large["tokenizer.json"] + b"\n"}})
    assert hub.sent("tokenizer.json") == 0
    assert cakefs.json("show", "org/large")["no_gguf"] == ""


def test_refusal_is_shown_and_add_goes_on(hub: Hub, cakefs: Cakefs) -> None:
    quantized = {"quantization_config": {"quant_method": "awq"}}
    published = {"x.bin": b"x", "y.gguf": b"GGML"}
    positions = {"rope_theta": "x", "rope_scaling": {"rope_type": "llama3"}}
    models = {"a": make("llama", config=quantized), "b": make("llama", files=published)}
    add(hub, cakefs, models | {"c": make("llama", config=positions)})
    assert cakefs.json("show", "org/a")["no_gguf"] == (
        "config.json: weights are quantized (quantization_config: 'awq')"
    )
    assert "no GGUF   config.json: weights are quantized" in cakefs.run("show", "org/a").stdout
    assert "model.gguf" not in cakefs.run("show", "org/b").stdout
    assert cakefs.json("show", "org/b")["no_gguf"] == ""
    assert cakefs.json("show", "org/c")["no_gguf"].startswith("a value is not of the form it should have")


def test_slices_and_merges_have_it_for_a_header(hub: Hub, cakefs: Cakefs) -> None:
    add(hub, cakefs, cases("qwen3-f32", "gemma2-f32"))
    cakefs.run("merge", "org/qwen3-f32", "--repeat-map", "0,1,0,1", "--as", "me/long")
    cakefs.run("slice", "org/qwen3-f32", "--layers", "1", "--as", "me/part")
    whole = ("--renumber", "--with-embeddings", "--with-head")
    cakefs.run("slice", "org/gemma2-f32", "--layers", "1", "--as", "me/odd", *whole)
    sizes = {f["path"]: f["size"] for f in cakefs.json("show", "me/long")["files"]}
    assert sizes["model.gguf"] > sizes["model.safetensors"]
    assert cakefs.json("show", "me/part")["no_gguf"] == "there is no tensor to make token_embd.weight of"
    assert cakefs.json("show", "me/odd")["no_gguf"] == ""  # a layer of full attention first


# --- llama.cpp ------------------------------------------------------------------------------------------------------

TOKENS = 16
WINDOW = 64  # of gemma; the prompt is longer
PROMPT = [(37 * i * i + 11 * i + 5) % 240 + 5 for i in range(WINDOW + 26)]
TEXTS = ["The fox's tale, and 12345 on the  hill\n\n we'LL\tre-in na\u00efve \u4f60 <tool_call>", " and the"]

# In processes of their own, as a user's would be. The runtime ends a process that it cannot please.
LLAMA = """
import json, sys, urllib.request, xllamacpp as x
def ask(server, path, **body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    return json.load(urllib.request.urlopen(request))
paths, prompt, count, mode, texts = json.loads(sys.argv[1])
found = {}
for path in paths:
    p = x.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.fit_params, p.verbosity = path, 256, 1, False, False, -1
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.load_mode = getattr(x.llama_load_mode, "LLAMA_LOAD_MODE_" + mode)
    server = x.Server(p)
    answer = ask(server, "/completion", prompt=prompt, n_predict=count, temperature=0.0, cache_prompt=False,
        repeat_penalty=1.0, return_tokens=True)  # the file may advise other sampling
    cut = [ask(server, "/tokenize", content=t, add_special=True, parse_special=True)["tokens"] for t in texts]
    found[path] = [answer["tokens"], cut]
print(json.dumps(found))
"""
TRANSFORMERS = """
import json, os, sys, torch, transformers
transformers.logging.set_verbosity_error()
paths, prompt, count, texts = json.loads(sys.argv[1])
found = {}
for path in paths:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    cut = None
    if "tokenizer.json" in os.listdir(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        cut = [tokenizer.encode(text) for text in texts]
    found[path] = [ids[len(prompt):], cut]
print(json.dumps(found))
"""
READER = """
import gguf, json, sys
reader = gguf.GGUFReader(json.loads(sys.argv[1])[0])
keys = [reader.fields[key].contents() for key in ("general.architecture", "llama.expert_count")]
tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_down_exps.weight")
print(json.dumps([*keys, tensor.name, tensor.shape.tolist()]))
"""
RUN = [
    "llama-f32", "Llama-3.1-35K-Instruct", "Llama-2-7b-chat-hf", "mistral-f32", "mixtral-f32", "qwen2-f32",
    "qwen3-f32", "yarn", "qwen2_moe-f32", "qwen3_moe-f32", "gemma2-f32", "gemma3_text-f32", "gemma-3-scaled",
    "phi3-f32", "phi3-long", "phi3-part", "phi-4", "nemo", "smol", "gpt-4o-cut", "gpt-2-cut", "turns",
]  # fmt: skip
AGAIN = ("llama", "gemma2", "phi3")  # as transformers 5 saves them


def run(program: str, *arguments: Any) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def library(hub: Hub, cakefs: Cakefs) -> Iterator[Path]:
    """Mounted: all that is run, a merge and a slice."""
    pytest.importorskip("xllamacpp", reason="needs llama.cpp (the `loaders` extra)")
    add(hub, cakefs, cases(*RUN) | {f"{kind}-again": saved_again(kind) for kind in AGAIN})
    for name in ("llama-f32", "gemma2-f32", "qwen3_moe-f32"):
        cakefs.run("merge", f"org/{name}", "--repeat-map", "0,0,1,1,0,1", "--as", f"org/{name}-long")
    cakefs.run("slice", "org/phi3-f32", "--layers", "1", "--as", "org/phi3-part-of", "--renumber",
        "--with-embeddings", "--with-head")  # fmt: skip
    with cakefs.mounted() as mount:
        yield mount / "org"


@pytest.mark.loaders
@needs_fuse
@pytest.mark.timeout(400)
def test_llama_cpp_generates_what_transformers_does_from_the_safetensors_beside_it(library: Path) -> None:
    names = [
        *RUN,
        *(f"{kind}-again" for kind in AGAIN),
        "llama-f32-long",
        "gemma2-f32-long",
        "qwen3_moe-f32-long",
        "phi3-part-of",
    ]
    paths = [str(library / name) for name in names]
    expected = run(TRANSFORMERS, paths, PROMPT, TOKENS, TEXTS)
    files = {path: f"{path}/model.gguf" for path in paths}
    found = run(LLAMA, list(files.values()), PROMPT, TOKENS, "MMAP", TEXTS)
    for path, (tokens, cut) in expected.items():
        generated, llama_cut = found[files[path]]
        assert generated == tokens[: len(generated)], path  # it stops behind the end of a text
        assert generated
        if cut is not None:
            same = 1 if path.endswith(("llama-again", "phi3-again")) else 2  # transformers adds no space to a space
            assert llama_cut[:same] == cut[:same], path
    for mode in ("NONE", "DIRECT_IO"):
        some = [files[path] for path in paths[:4]]
        assert run(LLAMA, some, PROMPT, TOKENS, mode, TEXTS) == {path: found[path] for path in some}


@pytest.mark.loaders
@needs_fuse
def test_gguf_package_reads_it(hub: Hub, cakefs: Cakefs) -> None:
    pytest.importorskip("gguf", reason="needs the gguf package (the `loaders` extra)")
    add(hub, cakefs, cases("mixtral-bf16"))
    with cakefs.mounted() as mount:
        found = run(READER, str(mount / "org/mixtral-bf16/model.gguf"))
    assert found == ["llama", 3, "blk.1.ffn_down_exps.weight", [48, 32, 3]]
