"""`model.gguf` of safetensors: byte for byte what llama.cpp's converter writes, or refused by name."""

import hashlib
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.errors import InvalidFormat
from cakefs.formats.gguf import Header, parse_header
from cakefs.formats.sentencepiece import Algorithm, PieceType, parse_model
from cakefs.model import Computed, Extent, Literal, View
from cakefs.plan import compute
from cakefs.plan.ggufview.card import Sizes, take_apart, titled
from tests.gguf_tokenizers import BYTES, DIGITS, GEMMA_SETTINGS, LLAMA3, QWEN_SETTINGS, bpe, rule, sentencepiece, split
from tests.gguf_view_kit import shelve
from tests.gguf_view_models import CASES, llama3, make, safetensors, saved_again, weights
from tests.gguf_view_record import RECORD

RECORDED: dict[str, str] = json.loads(RECORD.read_text())["sha256"]


QWEN2 = make("qwen2")


def test_every_case_is_recorded() -> None:
    assert RECORDED.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_file_is_the_one_that_the_converter_writes(name: str) -> None:
    shelf = shelve(name, CASES[name].files)
    assert shelf.refused == ""
    assert hashlib.sha256(shelf.read()).hexdigest() == RECORDED[name]


@pytest.mark.parametrize("name", ["Llama-3.1-35K-Instruct", "gemma2-bf16", "mixtral-bf16", "phi3-long"])
def test_any_range_is_that_of_the_whole(name: str) -> None:
    shelf = shelve(name, CASES[name].files)
    whole, rng = shelf.read(), np.random.default_rng(1)
    for _ in range(40):
        start, stop = sorted(map(int, rng.integers(0, len(whole), 2)))
        assert shelf.read(start, stop) == whole[start:stop]


@pytest.mark.parametrize("name", ["qwen3-bf16", "mixtral-f32", "llama-bf16"])
def test_only_header_and_vocabulary_are_new(name: str) -> None:
    shelf = shelve(name, CASES[name].files)
    new = sum(len(data) for data in shelf.literals.data)
    weights_size = len(shelf.files["model.safetensors"])
    assert new == shelf.file.size - sum(s.size for s in shelf.file.segments if not isinstance(s, Literal))
    assert new < 20_000 < weights_size
    tokenizer = [literal for literal in shelf.literals.data if b"tokenizer.ggml.tokens" in literal]
    other = shelve("another-name", CASES[name].files)
    assert tokenizer == [literal for literal in other.literals.data if b"tokenizer.ggml.tokens" in literal]


def test_matrices_are_extents_and_norms_are_widened() -> None:
    shelf = shelve("qwen3-bf16", CASES["qwen3-bf16"].files)
    spans = {t.span: t for t in shelf.outcome.manifest.tensors}
    matrices = [s for s in shelf.file.segments if isinstance(s, Extent)]
    assert {len(spans[s.span].shape) for s in matrices} == {2}
    assert {s.op for s in shelf.file.segments if isinstance(s, Computed)} == {"cast"}


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(files: dict[str, bytes]) -> str:
    shelf = shelve("some-model", files)
    assert "model.gguf" not in shelf.outcome.manifest.shown(View.MODEL)
    return shelf.refused


def with_config(files: dict[str, bytes], **config: Any) -> dict[str, bytes]:
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | config).encode()}


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another architecture": ("llama", {"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel'"),
    "no architecture": ("llama", {"architectures": None}, "architecture None"),
    "another type": ("llama", {"model_type": "granite"}, "model_type 'granite'"),
    "quantized": (
        "llama",
        {"quantization_config": {"quant_method": "gptq"}},
        "quantized (quantization_config: 'gptq')",
    ),
    "quantized by mlx": ("llama", {"quantization": {"group_size": 64, "bits": 4}}, "quantized (quantization)"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "dynamic positions": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    "longrope": ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    "yarn's factor": (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9}},
        "factors of rope_scaling",
    ),
    "no factor": ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor of rope_scaling is None"),
    "yarn not cut": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
        "not to be truncated",
    ),
    "positions of two kinds": (
        "qwen3",
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}, "sliding_attention": {}}},
        "told by kind of attention",
    ),
    "positions of pictures": ("qwen2", {"rope_scaling": {"mrope_section": [1, 2, 3]}}, "rope_scaling says"),
    "windows": ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
    "gemma's window": ("gemma3_text", {"sliding_window": None}, "sliding_window is None"),
    "qwen2's heads": ("qwen2", {"head_dim": 16}, "head_dim is 16"),
    "phi3's heads": ("phi3", {"head_dim": 16}, "head_dim is 16"),
    "experts not in every layer": ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    "experts every other layer": ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    "experts weighed otherwise": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    "attention scaled otherwise": ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar is not 16"),
    "no cap": ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is None"),
    "no cap of attention": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
    "another head": ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    "no head of its own": ("qwen2_moe", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "capped attention": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "both directions": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "layers of no kind": ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types"),
    "gemma2's positions": ("gemma2", {"rope_theta": 20000.0}, "rope.theta is 20000.0"),
    "a key never seen": ("llama", {"n_group": 4}, "n_group is not known here"),
    "more layers": ("llama", {"num_hidden_layers": 3}, "no tensor to make blk.2"),
    "fewer layers": ("llama", {"num_hidden_layers": 1}, "a layer that config.json does not count"),
    "odd heads": ("llama", {"num_attention_heads": 3}, "not a multiple"),
    "many heads": ("llama", {"num_key_value_heads": 32}, "rows, which are not 32 heads"),
    "layers without end": ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "tokens without end": ("llama", {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    "a head without end": ("llama", {"head_dim": 10**12}, "head_dim is 1000000000000"),
    "no number": ("llama", {"hidden_size": "32"}, "hidden_size is '32'"),
    "a smaller vocabulary": ("llama", {"vocab_size": 290}, "the embedding has 300 rows"),
    "no pictures": ("llama", {"text_config": {}}, "text_config is not known here"),
}


@pytest.mark.parametrize("why", CONFIGS)
def test_config_is_refused_by_the_key(why: str) -> None:
    kind, config, expected = CONFIGS[why]
    assert expected in refusal(with_config(make(kind), **config))


def test_rhythm_of_attention_is_told_where_it_is_not_the_usual() -> None:
    kinds = ["full_attention", "sliding_attention"]
    shelf = shelve("gemma2-f32", with_config(make("gemma2"), layer_types=kinds))
    assert shelf.refused == ""
    key = b"gemma2.attention.sliding_window_pattern" + bytes([9, 0, 0, 0, 7, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    assert key in shelf.read()


def test_rhythm_is_stated_as_transformers_reads_it() -> None:
    def told(kind: str, **config: Any) -> bool:
        return b"sliding_window_pattern" in shelve("m", with_config(make(kind), **config)).read()

    assert told("gemma3_text", sliding_window_pattern=2)
    assert not told("gemma3_text", _sliding_window_pattern=2)
    assert not told("gemma2", sliding_window_pattern=6)


def test_tensors_are_refused_by_name() -> None:
    files = make("llama")
    config = json.loads(files["config.json"])
    arrays = weights(config)

    def changed(dtype: str = "F32", *, drop: str = "", **more: Any) -> str:
        kept = {name: array for name, array in arrays.items() if name != drop} | more
        return refusal(files | {"model.safetensors": safetensors(kept, lambda name: dtype)})

    assert "is of F64" in changed("F64")
    assert "blk.1.ffn_up.weight" in changed(drop="model.layers.1.mlp.up_proj.weight")
    assert "no lm_head.weight" in changed(drop="lm_head.weight")
    assert "output_norm.weight" in changed(drop="model.norm.weight")
    name = "model.layers.0.self_attn.sinks"
    assert f"tensor '{name}' has no place" in changed(**{name: np.ones(4, np.float32)})
    assert "'visual.patch'" in changed(**{"visual.patch": np.ones(4, np.float32)})
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    more = safetensors(arrays | buffer, lambda name: "F32")
    assert shelve("x", files | {"model.safetensors": more}).read() == shelve("x", files).read()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_biases_that_llama_cpp_does_not_load_are_refused(kind: str) -> None:
    files = make(kind)
    name = "model.layers.0.self_attn.o_proj.bias"
    arrays = weights(json.loads(files["config.json"])) | {name: np.ones(32, np.float32)}
    assert f"tensor '{name}' has no place" in refusal(
        files | {"model.safetensors": safetensors(arrays, lambda name: "F32")}
    )


def test_matrices_keep_their_own_precision() -> None:
    """Where the converter would round the wider ones."""

    def mixed(name: str) -> str:
        return "F32" if "layers.1" in name else "F16" if "v_proj" in name else "BF16"

    for kind in ("qwen2", "mixtral"):
        shelf = shelve("m", make(kind, mixed))
        data = shelf.read()
        header = parse_header(data, len(data), "m")
        assert isinstance(header, Header) and header.get("general.file_type") == 32
        types = {t.name: t.dtype for t in header.tensors}
        assert (types["blk.0.attn_v.weight"], types["blk.1.attn_v.weight"]) == ("F16", "F32")
        assert types["token_embd.weight"] == types["blk.0.attn_output.weight"] == "BF16"
    some = make("mixtral", lambda name: "F32" if "experts.1.w2" in name else "BF16")
    stack = shelve("m", some)
    data = stack.read()
    header = parse_header(data, len(data), "m")
    assert isinstance(header, Header)
    assert {t.name: t.dtype for t in header.tensors}["blk.0.ffn_down_exps.weight"] == "F32"


def test_norms_are_shifted_without_rounding() -> None:
    files = make("gemma2", "F16")
    shelf = shelve("m", files)
    data = shelf.read()
    header = parse_header(data, len(data), "m")
    assert isinstance(header, Header)
    (norm,) = [t for t in header.tensors if t.name == "blk.1.post_ffw_norm.weight"]
    array = weights(json.loads(files["config.json"]))["model.layers.1.post_feedforward_layernorm.weight"]
    expected = array.astype(np.float16).astype(np.float32) + np.float32(1)
    assert data[norm.start : norm.start + norm.size] == expected.tobytes()
    assert (expected != expected.astype(np.float16)).any()


def test_what_says_nothing_is_left_out() -> None:
    """As the converter leaves out empty texts; a padding id of -1 stands for none."""
    files = with_config(make("llama"), pad_token_id=-1, _name_or_path="")
    shelf = shelve("m", files | {"README.md": b"---\nlicense: ''\nbase_model: [{name: ''}]\n---\n"})
    data = shelf.read()
    assert shelf.refused == ""
    for key in (b"padding_token_id", b"general.name", b"general.license", b"base_model.0.name"):
        assert key not in data


def test_tokenizers_are_refused_by_what_they_do() -> None:
    llama, qwen = make("llama"), make("qwen2")

    def model(**how: Any) -> str:
        return refusal(llama | {"tokenizer.model": sentencepiece(control=("<|endoftext|>",), **how)})

    def tokenizer(data: bytes, **changes: Any) -> str:
        found = json.loads(data) | changes
        return refusal(qwen | {"tokenizer.json": json.dumps(found).encode()})

    good = qwen["tokenizer.json"]
    assert "of the UNIGRAM kind" in model(algorithm=1)
    assert "changes text before it cuts it" in model(table=b"table")
    assert "is no SentencePiece model" in refusal(llama | {"tokenizer.model": b"hello"})
    assert "there is no tokenizer.model" in refusal({k: v for k, v in make("gemma2").items() if k != "tokenizer.model"})
    assert "there is no tokenizer.json" in refusal({k: v for k, v in qwen.items() if k != "tokenizer.json"})
    assert "cuts text by a rule" in tokenizer(bpe(rule(split(r"\w+"), BYTES)))
    assert "cuts text by a rule" in tokenizer(good, pre_tokenizer=None)
    assert "a normalizer of type 'Lowercase'" in tokenizer(good, normalizer={"type": "Lowercase"})
    assert "a model of type 'Unigram'" in tokenizer(good, model={"type": "Unigram", "vocab": []})
    assert "a post-processor of type 'BertProcessing'" in tokenizer(good, post_processor={"type": "BertProcessing"})
    assert "is not JSON" in refusal(qwen | {"tokenizer.json": b"{"})
    far = json.loads(good)["added_tokens"] + [{"id": 276, "content": "<far>", "special": True}]
    assert "token '<far>' has the id 276, config.json counts 276" in tokenizer(good, added_tokens=far)
    missing = QWEN_SETTINGS | {"pad_token": "<|nothing|>"}
    assert "names a pad_token" in refusal(qwen | {"tokenizer_config.json": json.dumps(missing).encode()})
    disagreeing = QWEN_SETTINGS | {"added_tokens_decoder": {"269": {"content": "<|other|>"}}}
    assert "do not agree about token 269" in refusal(qwen | {"tokenizer_config.json": json.dumps(disagreeing).encode()})


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3"])
def test_a_sentencepiece_vocabulary_needs_no_tokenizer_model(kind: str) -> None:
    """From tokenizer.json alone comes the file that both together give, which is the converter's."""
    alone = saved_again(kind)
    both = shelve("m", alone | {"tokenizer.model": make(kind)["tokenizer.model"]})
    shelf = shelve("m", alone)
    assert (shelf.refused, both.refused) == ("", "")
    assert shelf.read() == both.read()


def test_a_vocabulary_that_sentencepiece_would_join_otherwise_is_refused() -> None:
    good = json.loads(saved_again("llama")["tokenizer.json"])

    def changed(kind: str = "llama", model: dict[str, Any] | None = None, **changes: Any) -> str:
        found = good | changes | {"model": good["model"] | (model or {})}
        return refusal(saved_again(kind) | {"tokenizer.json": json.dumps(found).encode()})

    merges, vocab = good["model"]["merges"], good["model"]["vocab"]
    assert "behind a piece of a higher id" in changed(model={"merges": [*merges[1:], merges[0]]})
    assert "does not join all" in changed(model={"merges": merges[1:]})
    assert "does not count its tokens from 0" in changed(model={"vocab": vocab | {"zz": 900}})
    assert "pieces of more letters" in changed(model={"vocab": vocab | {"z" * 10_000_000: len(vocab)}})
    assert "is not SentencePiece's" in changed(model={"ignore_merges": True})
    assert "is not SentencePiece's" in changed("gemma2", model={"byte_fallback": False})
    assert "cuts text by 'Digits'" in changed(pre_tokenizer=DIGITS)
    assert "cuts text by 'Metaspace'" in changed(pre_tokenizer=good["pre_tokenizer"] | {"split": True})
    assert "does not mark spaces" in changed(pre_tokenizer=None)
    assert "puts a space in front" in changed("gemma2")
    bare = good["pre_tokenizer"] | {"prepend_scheme": "never"}
    shelf = shelve("m", saved_again("llama") | {"tokenizer.json": json.dumps(good | {"pre_tokenizer": bare}).encode()})
    header = parse_header(shelf.read(), shelf.file.size, "m")
    assert isinstance(header, Header) and header.get("tokenizer.ggml.add_space_prefix") is False


@pytest.mark.parametrize("path", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("data", [b"", b"[]", b"1", b"{", b'{"model": 3, "added_tokens_decoder": 1}', b"[" * 100_000])
def test_nonsense_is_refused_and_breaks_nothing(path: str, data: bytes) -> None:
    assert refusal(make("qwen2") | {path: data})


@pytest.mark.parametrize("theta", ["x", -5.0, 1e300, 0, [], None])
def test_positions_that_cannot_be_calculated_are_refused(theta: Any) -> None:
    scaling = json.loads(CASES["Llama-3.1-35K-Instruct"].files["config.json"])["rope_scaling"]
    assert "is not of the form" in refusal(llama3(rope_theta=theta, rope_scaling=scaling))


def test_a_refusal_is_a_short_line_whatever_the_model_says() -> None:
    qwen, text = make("qwen2"), "\x1b[31mred\n" * 1000

    def tokenizer(**changes: Any) -> dict[str, bytes]:
        return qwen | {"tokenizer.json": json.dumps(json.loads(qwen["tokenizer.json"]) | changes).encode()}

    for files in (
        with_config(qwen, architectures=[text]),
        with_config(qwen, quantization_config={"quant_method": text}),
        with_config(qwen, rope_theta=text),
        tokenizer(model={"type": text}),
        tokenizer(normalizer={"type": text}),
        tokenizer(post_processor={"type": text}),
        tokenizer(added_tokens=[{"id": text, "content": text}]),
    ):
        message = refusal(files)
        assert len(message) < 200 and message.isprintable(), message


@given(st.dictionaries(st.sampled_from(["model", "added_tokens", "post_processor", "normalizer"]), st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "vocab", "id"]), inner),
    max_leaves=6,
)))  # fmt: skip
def test_no_tokenizer_breaks_add(changes: dict[str, Any]) -> None:
    found = json.loads(QWEN2["tokenizer.json"]) | changes
    shelf = shelve("x", QWEN2 | {"tokenizer.json": json.dumps(found).encode()})
    shown = shelf.outcome.manifest.shown(View.MODEL)
    assert "model.safetensors" in shown and ("model.gguf" in shown) == (not shelf.refused)


def test_published_gguf_is_enough() -> None:
    shelf = shelve("llama-f32", make("llama", files={"other-Q4_K_M.gguf": b"x"}))
    assert shelf.refused == ""
    assert "model.gguf" not in shelf.outcome.manifest.shown(View.MODEL)


def test_odd_model_cards_do_no_harm() -> None:
    bomb = "---\na: &a [x, x, x, x, x, x, x, x, x]\n"
    for letter, before in zip("bcdefghijklmnop", "abcdefghijklmno", strict=True):
        bomb += f"{letter}: &{letter} [{', '.join([f'*{before}'] * 9)}]\n"
    plain = shelve("m", make("llama")).read()
    for head in (
        bomb + "tags: *p\n---\n",
        "---\n: [",
        "---\nname: {a: 1}\nlicense: [1]\n",
        "--- x\n",
        "---\n- a\n---\n",
    ):
        shelf = shelve("m", make("llama", files={"README.md": head.encode()}))
        assert shelf.refused == "" and (shelf.read() == plain or b"general.license" in shelf.read())
    nested = '{"type": "Sequence", "pretokenizers": [' * 5000 + "]}" * 5000
    deep = QWEN2["tokenizer.json"].replace(b'"pre_tokenizer": {', b'"pre_tokenizer": ' + nested.encode() + b', "x": {')
    assert refusal(QWEN2 | {"tokenizer.json": deep})


@pytest.mark.parametrize("value", [b"{}", b"[]", b'"ab"', b"0"])
def test_a_tokenizer_that_is_a_bomb_is_refused_in_little_memory(value: bytes) -> None:
    files = make("qwen2")
    bomb = b'{"x": [' + b",".join([value] * 6_000_000) + b"]}"
    tracemalloc.start()
    try:
        assert "tokenizer.json has more than 6000000 values" in refusal(files | {"tokenizer.json": bomb})
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_reranker_is_refused() -> None:
    assert "reranker" in shelve("Qwen3-Reranker-0.6B", make("qwen3")).refused


# --- parts ----------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from([(1, 2, 3), (2, 8, 1), (3, 6, 5), (4, 16, 2)]),
    st.sampled_from(["F32", "F16"]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_interleaved_rows_are_those_of_the_formula(
    shape: tuple[int, int, int], dtype: str, start: float, stop: float
) -> None:
    heads, rows, width = shape
    item = compute.item_size(dtype)
    data = np.random.default_rng(3).integers(0, 256, (heads * rows, width * item), np.uint8)
    whole = data.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).tobytes()
    node = Computed("interleave", dtype, data.size, (Extent(0, 0, data.size),), (dtype,), (heads, heads * rows))
    a, b = sorted((int(start * (data.size - 1)), int(stop * (data.size - 1))))
    needs = compute.needs(node, a, b + 1)
    assert len(needs) <= 5
    assert compute.evaluate(node, a, b + 1, [data.tobytes()[n.start : n.stop] for n in needs]) == whole[a : b + 1]


def test_sentencepiece_model_is_read() -> None:
    model = parse_model(sentencepiece(gemma=True), "tokenizer.model")
    assert model.algorithm is Algorithm.BPE and model.verbatim
    assert [piece.text for piece in model.pieces[:4]] == [b"<pad>", b"<eos>", b"<bos>", b"<unk>"]
    assert [piece.type for piece in model.pieces[3:5]] == [PieceType.UNKNOWN, PieceType.BYTE]
    assert model.pieces[-1].score < 0


@given(st.binary(max_size=60) | st.integers(0, 400).map(lambda n: sentencepiece()[:n]))
def test_broken_sentencepiece_models_are_refused_in_one_way(data: bytes) -> None:
    try:
        parse_model(data, "tokenizer.model")
    except InvalidFormat as error:
        assert error.message.startswith("tokenizer.model is no SentencePiece model: ")


def test_names_are_taken_apart() -> None:
    # As the tests of llama.cpp's gguf package have them.
    mixtral = take_apart("Mixtral-8x7B-Instruct-v0.1", 0)
    assert mixtral[1:] == (None, "Mixtral", "Instruct", "v0.1", "8x7B")
    assert take_apart("delta-vector/Qwen2-1.5B-i-v2", 0)[1:] == ("delta-vector", "Qwen2", "i", "v2", "1.5B")
    assert take_apart("bigscience/bloom-7b1-petals", 0)[1:] == ("bigscience", "bloom", "petals", None, "7.1B")
    assert take_apart("Llama-3-Instruct-8B-64k", 8_000_000_000)[2:] == ("Llama-3", "Instruct-64k", None, "8B")
    assert take_apart("Phi-3-mini-4k-instruct", 4_000_000_000)[2:] == ("Phi-3", "4k-instruct", None, "mini")
    assert take_apart("a name of words", 7)[:3] == ("a name of words", None, None)
    assert titled("some-model-v0.1-7b") == "Some Model v0.1 7b"


def test_sizes_are_labelled() -> None:
    assert Sizes.of([("a", (7_615_616_512,))]).label() == "7.6B"
    assert Sizes.of([("a", (494_032_768,))]).label() == "494M"
    assert Sizes.of([("a.weight", (1000,)), ("blk.0.ffn_up_exps.weight", (8, 10, 100))]).label() == "8x2.0K"


def test_llama3_rule_without_whole_words_is_another() -> None:
    files = llama3()
    loose = bpe(rule(split(LLAMA3), BYTES), ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<plain>"))
    assert b"llama-bpe" in shelve("x", files).read()
    assert b"dbrx" in shelve("x", files | {"tokenizer.json": loose}).read()


def test_gemma_settings_without_decoder_are_enough() -> None:
    plain = {k: v for k, v in GEMMA_SETTINGS.items() if k != "added_tokens_decoder"}
    shelf = shelve("gemma2-f32", make("gemma2") | {"tokenizer_config.json": json.dumps(plain).encode()})
    assert shelf.refused == ""
