"""Slices and merges as manifests: what is in them, what is refused, what they cost."""

import time
from collections.abc import Mapping
from typing import Any

import pytest

from cakefs.errors import UserError
from cakefs.formats.safetensors import parse_header
from cakefs.model import COMPUTED, LayerOrigin, Literal, Manifest, StackLayer, View, decode_manifest, encode_manifest
from cakefs.plan.merge import build_merge
from cakefs.plan.recipe import parse_recipe
from cakefs.plan.slice import Composed, build_slice
from tests.shelf import LLAMA, Shelf, llama, qwen_4bit


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def config(layers: int, **more: Any) -> dict[str, Any]:
    return {**LLAMA, "num_hidden_layers": layers, **more}


def cut(shelf: Shelf, manifest: Manifest, layers: str, **options: Any) -> Composed:
    return build_slice(
        manifest,
        layers,
        name="me/cut",
        created=5,
        read_small=shelf.read,
        put_literal=shelf.put,
        **options,
    )


def merge(shelf: Shelf, recipe: str, *models: Manifest, **options: Any) -> Composed:
    return build_merge(
        parse_recipe(recipe), {m.name: m for m in models}, name="me/view", created=5, read_small=shelf.read,
        put_literal=shelf.put, **options,
    )  # fmt: skip


def refused(shelf: Shelf, recipe: str, *models: Manifest) -> UserError:
    with pytest.raises(UserError) as caught:
        merge(shelf, recipe, *models)
    assert "\n" not in caught.value.message
    return caught.value


def passthrough(*slices: tuple[str, int, int], head: str = "", extra: str = "") -> str:
    parts = "".join(f"- sources: [{{model: {m}, layer_range: [{a}, {b}]}}]\n" for m, a, b in slices)
    return f"merge_method: passthrough\n{head}{extra}slices:\n{parts}"


# --- slices ---------------------------------------------------------------------------------------------------------


def test_the_case_of_evilsocket(shelf: Shelf) -> None:
    """Layers 0 and 1 of a 4-bit Qwen2.5-7B: 250.1 MiB out of 3.99 GiB."""
    qwen = {"model_type": "qwen2", "num_hidden_layers": 28, "tie_word_embeddings": False}
    model = shelf.hollow("mlx/qwen", qwen_4bit(), qwen)
    assert len(model.tensors) == 735
    assert sum(model.spans[t.span].size for t in model.tensors) == 4_284_263_424
    view = cut(shelf, model, "0-1").manifest
    file = view.shown(View.MODEL)["model.safetensors"]
    header = file.segments[0]
    assert len(view.tensors) == 52
    assert isinstance(header, Literal) and file.size - header.size == 262_223_872
    assert abs(file.size - 262_229_627) < 4096
    assert {t.name.split(".")[2] for t in view.tensors} == {"0", "1"}
    assert sum(span.size for span in view.spans) == 262_223_872 + view.sources[1].locator.size


def test_a_slice_keeps_names_bytes_and_config(shelf: Shelf) -> None:
    files = {"tokenizer.json": b"{}", "README.md": b"#", "pytorch_model.bin": b"x", "LICENSE": b"l", "merges.txt": b""}
    model = shelf.model("org/a", llama(12), config(12), files=files)
    view = cut(shelf, model, "1,3").manifest
    assert shelf.tensors(view) == {
        n: b for n, b in shelf.tensors(model).items() if n.startswith(("model.layers.1.", "model.layers.3."))
    }
    assert shelf.read(view, "config.json") == shelf.read(model, "config.json")
    assert set(view.shown(View.MODEL)) == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "LICENSE",
        "merges.txt",
    }
    assert view.shown(View.ORIGINAL) == {}
    assert view.stack == tuple(StackLayer(i, (LayerOrigin("org/a", i, "c0ffee"),)) for i in (1, 3))
    assert (view.name, view.created, view.revision) == ("me/cut", 5, "")
    assert decode_manifest(encode_manifest(view)) == view


def test_layer_1_is_not_layer_10(shelf: Shelf) -> None:
    model = shelf.model(
        "a", {f"model.layers.{i}.w": ("U8", (1,)) for i in range(10, 20)} | {"model.layers.1.w": ("U8", (2,))}, None
    )
    assert list(shelf.tensors(cut(shelf, model, "1", prefix="model.layers").manifest)) == ["model.layers.1.w"]


def test_embeddings_and_head_on_request(shelf: Shelf) -> None:
    model = shelf.model("a", llama(2), config(2))
    names = {t.name for t in cut(shelf, model, "0", with_embeddings=True).manifest.tensors}
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names and "model.norm.weight" not in names
    names = {t.name for t in cut(shelf, model, "0", with_head=True).manifest.tensors}
    assert "model.embed_tokens.weight" not in names and {"lm_head.weight", "model.norm.weight"} <= names
    tied = shelf.model("t", llama(2, tied=True), config(2, tie_word_embeddings=True))
    assert "model.embed_tokens.weight" in {t.name for t in cut(shelf, tied, "0", with_head=True).manifest.tensors}
    odd = shelf.model("o", {"layers.0.w": ("U8", (1,)), "x.w": ("U8", (1,))}, None)
    assert "no embeddings" in cut(shelf, odd, "0", with_embeddings=True).warnings[0]


def test_renumbered_layers_fit_their_config(shelf: Shelf) -> None:
    kinds = [f"{'full' if i % 2 else 'sliding'}_attention" for i in range(4)]
    model = shelf.model("a", llama(4), config(4, layer_types=kinds))
    view = cut(shelf, model, "1,3", renumber=True).manifest
    assert shelf.config(view) == config(2, layer_types=[kinds[1], kinds[3]])
    assert {t.name.split(".")[2] for t in view.tensors} == {"0", "1"}
    of_source = shelf.tensors(model)
    assert all(b == of_source[n.replace(".1.", ".3.").replace(".0.", ".1.")] for n, b in shelf.tensors(view).items())
    assert [(e.layer, e.origins[0].layer) for e in view.stack] == [(0, 1), (1, 3)]


def test_a_whole_renumbered_slice_is_the_file_itself(shelf: Shelf) -> None:
    model = shelf.model("a", llama(3), config(3))
    view = cut(shelf, model, "0-2", with_embeddings=True, with_head=True, renumber=True).manifest
    assert shelf.read(view, "model.safetensors") == shelf.read(model, "model.safetensors")


def test_with_embeddings_and_head_everything_is_in(shelf: Shelf) -> None:
    """As `--renumber` promises a model that loads: a tower and what has no known name too."""
    tower = {"vision_tower.layers.0.w": ("BF16", (2,)), "projector.w": ("BF16", (2,)), "mystery": ("BF16", (2,))}
    model = shelf.model("a", {**llama(2), **tower}, config(2, vision_config={"num_hidden_layers": 1}))
    whole = cut(shelf, model, "1", with_embeddings=True, with_head=True, renumber=True)
    assert {t.name for t in whole.manifest.tensors} == {
        n for n in shelf.tensors(model) if not n.startswith("model.layers.1.")
    }
    assert whole.warnings == ()
    assert "also needs --with-embeddings and --with-head" in cut(shelf, model, "1", renumber=True).warnings[0]
    part = cut(shelf, model, "1", with_embeddings=True)
    assert "mystery" not in shelf.tensors(part.manifest) and part.warnings == ()


@pytest.mark.parametrize(
    ("layers", "options", "message", "hint"),
    [
        ("", {}, "layers '': an entry is empty", "there is: model.layers.{0-3}"),
        ("3-1", {}, "3-1 runs backwards", "did you mean 1-3?; there is: model.layers.{0-3}"),
        ("0-100000", {}, "no model has layer 100000", "there is: model.layers.{0-3}"),
        ("4", {}, "layers: layer 4 is not in a", "model.layers.{0-3}"),
        ("2-9", {}, "layers: layers 4-9 are not in a", "model.layers.{0-3}"),
        ("0", {"prefix": "model.layer"}, "prefix 'model.layer' matches no layer", "model.layers (layers 0-3)"),
    ],
)
def test_what_is_not_there_is_named(shelf: Shelf, layers: str, options: Any, message: str, hint: str) -> None:
    model = shelf.model("a", llama(4), config(4))
    with pytest.raises(UserError) as caught:
        cut(shelf, model, layers, **options)
    assert message in caught.value.message and hint in caught.value.hint


def test_no_safetensors_no_slice(shelf: Shelf) -> None:
    with pytest.raises(UserError, match=r"g has no model\.safetensors"):
        cut(shelf, shelf.published("g", {"x.gguf": b"GGUF"}), "0")


def test_an_encoder_and_a_decoder_need_a_prefix(shelf: Shelf) -> None:
    shapes = {f"{side}.block.{i}.w": ("U8", (1,)) for side in ("encoder", "decoder") for i in range(2)}
    model = shelf.model("t5", shapes, {"model_type": "t5", "num_layers": 2, "is_encoder_decoder": True})
    with pytest.raises(UserError, match="an encoder and a decoder"):
        cut(shelf, model, "0")
    view = cut(shelf, model, "1", prefix="decoder.block", renumber=True).manifest
    assert list(shelf.tensors(view)) == ["decoder.block.0.w"]
    assert shelf.config(view)["num_decoder_layers"] == 1 and shelf.config(view)["num_layers"] == 2


def mtp(layers: int) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    return {**llama(layers), f"model.layers.{layers}.eh_proj.weight": ("BF16", (4,))}


def test_heads_for_further_tokens_stay_behind_the_last_layer(shelf: Shelf) -> None:
    model = shelf.model("a", mtp(3), config(3, num_nextn_predict_layers=1))
    view = merge(shelf, "model: a\nrepeat_map_raw: [0, 1, 1, 2]\n", model).manifest
    names = set(shelf.tensors(view))
    assert "model.layers.4.eh_proj.weight" in names and "model.layers.3.eh_proj.weight" not in names
    assert shelf.config(view)["num_hidden_layers"] == 4 and shelf.config(view)["num_nextn_predict_layers"] == 1
    short = cut(shelf, model, "0,2", renumber=True).manifest
    assert shelf.config(short)["num_nextn_predict_layers"] == 0
    kept = cut(shelf, model, "0,2-3", renumber=True).manifest
    assert (
        "model.layers.2.eh_proj.weight" in shelf.tensors(kept) and shelf.config(kept)["num_nextn_predict_layers"] == 1
    )


def test_the_count_of_further_heads_is_that_of_the_last_model(shelf: Shelf) -> None:
    """Whatever the first one says: a view of the view would not find its layers otherwise."""
    none, without = (
        shelf.model(n, llama(3), config(3, **c)) for n, c in (("n", {"num_nextn_predict_layers": 0}), ("w", {}))
    )
    one = shelf.model("a", mtp(3), config(3, num_nextn_predict_layers=1))
    for first in (none, without):
        view = merge(shelf, passthrough((first.name, 0, 2), ("a", 1, 3)), first, one).manifest
        assert "model.layers.4.eh_proj.weight" in shelf.tensors(view)
        assert shelf.config(view)["num_nextn_predict_layers"] == 1
        again = build_merge(
            parse_recipe("model: v\nrepeat_map_raw: [0, 1, 1]\n"), {"v": view}, name="again", created=1,
            read_small=shelf.read, put_literal=shelf.put,
        ).manifest  # fmt: skip
        assert "model.layers.3.eh_proj.weight" in shelf.tensors(again)


@pytest.mark.parametrize("head", ["model.mtp_block.0.mlp.weight", "model.mtp_layers.0.fc.weight", "mtp.fc.weight"])
def test_further_heads_apart_from_the_layers_stay_and_are_counted(shelf: Shelf, head: str) -> None:
    """As in ernie4_5_moe, mimo and qwen3_next."""
    a, b = (
        shelf.model(n, {**llama(2), head: ("BF16", (4,))}, config(2, num_nextn_predict_layers=1)) for n in ("a", "b")
    )
    view = merge(shelf, passthrough(("a", 0, 2), ("b", 0, 2)), a, b).manifest
    assert shelf.tensors(view)[head] == shelf.tensors(b)[head]
    assert shelf.config(view)["num_nextn_predict_layers"] == 1
    for with_head in (True, False):
        part = cut(shelf, a, "0", renumber=True, with_head=with_head).manifest
        assert (head in shelf.tensors(part)) is with_head
        assert shelf.config(part)["num_nextn_predict_layers"] == int(with_head)


def test_further_heads_of_two_models_come_from_the_last(shelf: Shelf) -> None:
    """Those that have layers of their own, as in qwen3_next."""
    extra = {"mtp.fc.weight": ("BF16", (4,)), "mtp.layers.0.mlp.weight": ("BF16", (4,))}
    a, b = (shelf.model(n, {**llama(2), **extra}, config(2)) for n in ("a", "b"))
    made = shelf.tensors(merge(shelf, passthrough(("a", 0, 2), ("b", 0, 2)), a, b).manifest)
    assert all(made[name] == shelf.tensors(b)[name] for name in extra)


def test_a_config_that_counts_another_tower_is_not_cut(shelf: Shelf) -> None:
    shapes = {**llama(2), **{f"tower.blocks.{i}.w": ("BF16", (2,)) for i in range(4)}}
    model = shelf.model("a", shapes, config(2))
    view = cut(shelf, model, "2-3", prefix="tower.blocks").manifest
    assert shelf.read(view, "config.json") == shelf.read(model, "config.json")
    with pytest.raises(UserError, match=r"config\.json of a does not count the layers tower\.blocks\.N"):
        cut(shelf, model, "2-3", prefix="tower.blocks", renumber=True)
    with pytest.raises(UserError, match=r"model: config\.json of a does not count the layers tower\.blocks\.N"):
        merge(shelf, "model: a\nrepeat_map_raw: [0, 1]\n", model, prefix="tower.blocks")


# --- repeats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("ratio_repeat: '0:.3,.2:.4,.4:.5,.4:1'", [0, 1, 2, 3, 2, 3, 4, 4, 5, 4, 5, 6, 7, 8, 9]),
        ("ratio_repeat: '0:.3,.2:.4,.4:.5,.4:1'\nmode: david-code", [0, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9]),
        ("repeat_map_raw: [0, 1, 2, 1, 2, 3, 2, 3, 4]", [0, 1, 2, 1, 2, 3, 2, 3, 4]),
    ],
)
def test_repeats(shelf: Shelf, recipe: str, expected: list[int]) -> None:
    model = shelf.model("a", llama(10), config(10))
    view = merge(shelf, f"model: a\n{recipe}\n", model).manifest
    assert [entry.origins[0].layer for entry in view.stack] == expected
    source, made = shelf.tensors(model), shelf.tensors(view)
    assert len(made) == 3 + 3 * len(expected)
    for number, layer in enumerate(expected):
        for rest in ("input_layernorm", "self_attn.q_proj", "mlp.down_proj"):
            assert made[f"model.layers.{number}.{rest}.weight"] == source[f"model.layers.{layer}.{rest}.weight"]
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert made[name] == source[name]
    assert shelf.config(view) == config(len(expected))
    header = parse_header(shelf.read(view, "model.safetensors"), len(shelf.read(view, "model.safetensors")), "x")
    assert header.metadata == {"format": "pt"} and header.size % 8 == 0


def test_repeats_add_no_span_and_few_bytes(shelf: Shelf) -> None:
    model = shelf.model("a", llama(10), config(10))
    before = set(shelf.literals)
    view = merge(shelf, "model: a\nrepeat_map_raw: [0, 1, 2, 1, 2, 3, 2, 3, 4]\n", model).manifest
    assert {view.key(i) for i in range(len(view.spans))} <= {model.key(i) for i in range(len(model.spans))}
    assert len(view.spans) == 3 + 3 * 5  # five layers are used
    assert sum(len(shelf.literals[d]) for d in set(shelf.literals) - before) < 5000


def test_a_whole_model_is_its_own_file(shelf: Shelf) -> None:
    model = shelf.model("a", llama(4), config(4))
    view = merge(shelf, passthrough(("a", 0, 4)), model).manifest
    for path in ("model.safetensors", "config.json"):
        assert shelf.read(view, path) == shelf.read(model, path)


def test_70b_to_137_layers_in_a_moment(shelf: Shelf) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        name: ("BF16", (32000, 8192)) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    shapes["model.norm.weight"] = ("BF16", (8192,))
    for i in range(80):
        for name, shape in (("q", (8192, 8192)), ("k", (1024, 8192)), ("v", (1024, 8192)), ("o", (8192, 8192))):
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = ("BF16", shape)
        for name, shape in (("gate", (28672, 8192)), ("up", (28672, 8192)), ("down", (8192, 28672))):
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = ("BF16", shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = ("BF16", (8192,))
    model = shelf.hollow("org/70b", shapes, config(80, hidden_size=8192))
    before = set(shelf.literals)
    started = time.process_time()
    layers = [i for i in range(80) for _ in range(2 if 10 <= i < 67 else 1)]
    assert len(layers) == 137
    view = merge(shelf, f"model: org/70b\nrepeat_map_raw: {layers}\n", model).manifest
    assert time.process_time() - started < 1.0
    assert sum(len(shelf.literals[d]) for d in set(shelf.literals) - before) + len(encode_manifest(view)) < 2_000_000
    size = view.shown(View.MODEL)["model.safetensors"].size
    assert 0.585 < model.shown(View.MODEL)["model.safetensors"].size / size < 0.587  # 68.977 of 117.749 G parameters


# --- several models -------------------------------------------------------------------------------------------------


def test_ends_come_from_the_ends(shelf: Shelf) -> None:
    a, b = shelf.model("a", llama(4), config(4)), shelf.model("b", llama(6), config(6))
    view = merge(shelf, passthrough(("a", 0, 3), ("b", 2, 6)), a, b).manifest
    of_a, of_b, made = shelf.tensors(a), shelf.tensors(b), shelf.tensors(view)
    assert made["model.embed_tokens.weight"] == of_a["model.embed_tokens.weight"]
    assert made["model.norm.weight"] == of_b["model.norm.weight"] and made["lm_head.weight"] == of_b["lm_head.weight"]
    assert made["model.layers.3.mlp.down_proj.weight"] == of_b["model.layers.2.mlp.down_proj.weight"]
    assert shelf.config(view) == config(7)
    assert view.origin == "merge of a, b"
    assert [(e.origins[0].model, e.origins[0].layer) for e in view.stack] == [
        ("a", 0), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("b", 4), ("b", 5),
    ]  # fmt: skip


def test_the_base_model_gives_config_and_tokenizer(shelf: Shelf) -> None:
    a = shelf.model("a", llama(2), config(2, note="a"), files={"tokenizer.json": b"a"})
    b = shelf.model("b", llama(2), config(2, note="b"), files={"tokenizer.json": b"b"})
    view = merge(shelf, passthrough(("a", 0, 2), ("b", 0, 2)), a, b).manifest
    assert shelf.read(view, "tokenizer.json") == b"a" and shelf.config(view)["note"] == "a"
    view = merge(shelf, passthrough(("a", 0, 2), ("b", 0, 2), extra="base_model: b\n"), a, b).manifest
    assert shelf.read(view, "tokenizer.json") == b"b" and shelf.config(view)["note"] == "b"


def test_tied_models(shelf: Shelf) -> None:
    tied = [shelf.model(n, llama(2, tied=True), config(2, tie_word_embeddings=True)) for n in ("t", "u")]
    view = merge(shelf, passthrough(("t", 0, 2), ("u", 0, 2)), *tied).manifest
    assert "lm_head.weight" not in shelf.tensors(view) and shelf.config(view)["tie_word_embeddings"] is True


def test_a_head_in_the_file_of_a_tied_model_is_a_copy(shelf: Shelf) -> None:
    """Torch checkpoints have one. transformers does not tie where both are there and differ."""
    tied = config(2, tie_word_embeddings=True)
    a, b = shelf.model("a", llama(2), tied), shelf.model("b", llama(2), tied)
    bare = shelf.model("bare", llama(2, tied=True), tied)
    for slices, models in (((("a", 0, 1), ("b", 1, 2)), (a, b)), ((("bare", 0, 1), ("b", 1, 2)), (bare, b))):
        made = merge(shelf, passthrough(*slices), *models)
        assert "lm_head.weight" not in shelf.tensors(made.manifest)
        assert "b is tied: the head in its file is left out" in made.warnings
    mean = "merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {}}}, {{model: b}}]\n"
    assert "lm_head.weight" not in shelf.tensors(merge(shelf, mean.format("bare"), bare, b).manifest)
    assert "lm_head.weight" in shelf.tensors(merge(shelf, mean.format("a"), a, b).manifest)
    assert "lm_head.weight" in shelf.tensors(merge(shelf, "model: a\nrepeat_map_raw: [0, 0]\n", a).manifest)


def test_tied_and_untied_need_a_head(shelf: Shelf) -> None:
    tied = shelf.model("t", llama(2, tied=True), config(2, tie_word_embeddings=True))
    free = shelf.model("f", llama(2), config(2))
    slices = ("t", 0, 2), ("f", 0, 2)
    error = refused(shelf, passthrough(*slices), tied, free)
    assert "t uses its embedding as head, f has one of its own" in error.message and "head: f" in error.hint
    view = merge(shelf, passthrough(*slices, head="head: f\n"), tied, free).manifest
    assert shelf.tensors(view)["lm_head.weight"] == shelf.tensors(free)["lm_head.weight"]
    view = merge(shelf, passthrough(*slices, head="head: t\n"), tied, free).manifest
    assert shelf.tensors(view)["lm_head.weight"] == shelf.tensors(tied)["model.embed_tokens.weight"]
    assert shelf.config(view)["tie_word_embeddings"] is False


def test_a_named_head_is_the_head_of_an_average_too(shelf: Shelf) -> None:
    tied = shelf.model("t", llama(2, tied=True), config(2, tie_word_embeddings=True))
    free = shelf.model("f", llama(2), config(2))
    mean = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: t}, {model: f}]\n"
    assert "head: f" in refused(shelf, mean, tied, free).hint
    view = merge(shelf, mean + "head: f\n", tied, free).manifest
    assert shelf.tensors(view)["lm_head.weight"] == shelf.tensors(free)["lm_head.weight"]
    assert shelf.tensors(view)["model.norm.weight"] != shelf.tensors(free)["model.norm.weight"]


def test_a_named_head_and_the_config_know_the_tokens_of_the_embedding(shelf: Shelf) -> None:
    few = shelf.model("few", llama(2, tied=True), config(2, tie_word_embeddings=True))
    for many in (
        shelf.model("many", llama(2, vocabulary=20), config(2)),
        shelf.model("many", llama(2, vocabulary=20, tied=True), config(2, tie_word_embeddings=True)),
    ):
        error = refused(shelf, passthrough(("few", 0, 2), head="head: many\n"), few, many)
        assert error.message.endswith("of many scores 20 tokens, model.embed_tokens.weight of few knows 16")
    error = refused(shelf, passthrough(("few", 0, 2), head="base_model: many\n"), few, many)
    assert error.message == "config.json of many is for 20 tokens, model.embed_tokens.weight of few knows 16"


def test_a_named_head_is_told_wherever_the_config_says_tied(shelf: Shelf) -> None:
    def nested(tied: bool) -> dict[str, Any]:
        text = {**config(2, tie_word_embeddings=tied), "torch_dtype": "float32"}
        return {"model_type": "vlm", "text_config": text}

    tied, free = shelf.model("t", llama(2, tied=True), nested(True)), shelf.model("f", llama(2), nested(False))
    recipe = passthrough(("t", 0, 1), ("f", 1, 2), head="head: f\ndtype: bfloat16\n")
    told = shelf.config(merge(shelf, recipe, tied, free).manifest)
    assert told["tie_word_embeddings"] is told["text_config"]["tie_word_embeddings"] is False
    assert told["torch_dtype"] == told["text_config"]["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (llama(4, width=4), {"hidden_size": 4}, "slices[1].sources[0].model: hidden_size of b is 4, of a 8"),
        (llama(4, width=4), {}, "has shape"),
        (llama(4, vocabulary=20), {}, "lm_head.weight of b scores 20 tokens, model.embed_tokens.weight of a knows 16"),
        (llama(4), {"model_type": "mistral"}, "model_type of b is 'mistral', of a 'llama'"),
        (llama(4), {"architectures": ["X"]}, "architectures of b is ['X']"),
        (llama(3), {"num_hidden_layers": 4}, "layer 3 is not in b"),
        ({n.replace("model.", "m."): s for n, s in llama(4).items()}, {}, "layers of b are named m.layers.N"),
        (llama(4), {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}, "b has no layer 3"),
    ],
)
def test_what_does_not_fit_is_refused(shelf: Shelf, shapes: Any, settings: Any, message: str) -> None:
    a, b = shelf.model("a", llama(4), config(4)), shelf.model("b", shapes, {**config(4), **settings})
    before = set(shelf.literals)
    assert message in refused(shelf, passthrough(("a", 0, 4), ("b", 0, 4)), a, b).message
    assert set(shelf.literals) == before  # nothing half made


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("model: a\nrepeat_map_raw: [0, 4]\n", "repeat_map_raw[1]: layer 4 does not exist"),
        ("model: nobody\nrepeat_map_raw: [0]\n", "model: no model nobody"),
        (passthrough(("a", 0, 5)), "slices[0].sources[0].layer_range: a has no layer 4"),
        (passthrough(("a", 0, 1), ("x", 0, 1)), "slices[1].sources[0].model: no model x"),
        (passthrough(("a", 0, 1), extra="base_model: x\n"), "base_model: no model x"),
        (passthrough(("a", 0, 1), head="head: x\n"), "head: no model x"),
        ("merge_method: linear\nmodels: [{model: a}]\n", "models[0].parameters.weight: missing for model.layers.0"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 0}}]\n", "add up to 0"),
    ],
)
def test_bad_recipes(shelf: Shelf, recipe: str, message: str) -> None:
    model = shelf.model("a", llama(4), config(4))
    before = set(shelf.literals)
    assert message in refused(shelf, recipe, model).message
    assert set(shelf.literals) == before


def test_models_of_different_depth_are_not_averaged(shelf: Shelf) -> None:
    a, b = shelf.model("a", llama(4), config(4)), shelf.model("b", llama(5), config(5))
    recipe = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
    assert "models: the models have different numbers of layers: a 4, b 5" in refused(shelf, recipe, a, b).message


def test_no_config_no_merge(shelf: Shelf) -> None:
    model = shelf.model("a", llama(2), None)
    assert (
        "config.json of a does not count the layers model.layers.N"
        in refused(shelf, "model: a\nrepeat_map_raw: [0]\n", model).message
    )


def test_layers_that_differ_are_kept_and_told(shelf: Shelf) -> None:
    shapes = dict(llama(4))
    del shapes["model.layers.2.mlp.down_proj.weight"]
    made = merge(shelf, "model: a\nrepeat_map_raw: [0, 2, 2]\n", shelf.model("a", shapes, config(4)))
    assert made.warnings == ("layer 2 of a has no mlp.down_proj.weight; it is kept as it is",)
    assert "model.layers.1.mlp.down_proj.weight" not in shelf.tensors(made.manifest)


def test_a_first_layer_of_its_own_form_stays_the_first(shelf: Shelf) -> None:
    """T5 keeps its position bias there; where the config says what sets it apart, loaders follow the config."""
    shapes = {**llama(3), "model.layers.0.bias.weight": ("BF16", (2,))}
    model = shelf.model("a", shapes, config(3))
    assert merge(shelf, "model: a\nrepeat_map_raw: [0, 2, 1, 2]\n", model).warnings == ()
    for layers in ("[1, 2]", "[0, 1, 0]", "[2, 0]"):
        error = refused(shelf, f"model: a\nrepeat_map_raw: {layers}\n", model)
        assert "layer 0 of a alone has bias.weight" in error.message and "begin with layer 0" in error.hint
    with pytest.raises(UserError, match=r"layers: layer 0 of a alone has bias\.weight"):
        cut(shelf, model, "1-2", renumber=True)
    assert cut(shelf, model, "1-2").warnings == ()
    told = shelf.model("a", shapes, config(3, layer_types=["full_attention", *["sliding_attention"] * 2]))
    assert (
        shelf.config(merge(shelf, "model: a\nrepeat_map_raw: [1, 0]\n", told).manifest)["layer_types"][1][:4] == "full"
    )


def test_a_stack_without_its_ends_is_told(shelf: Shelf) -> None:
    model = shelf.model("a", llama(2), config(2))
    bare = cut(shelf, model, "0-1", with_head=True, renumber=True).manifest
    made = build_merge(
        parse_recipe("model: bare\nrepeat_map_raw: [0]\n"), {"bare": bare}, name="v", created=1, read_small=shelf.read,
        put_literal=shelf.put,
    )  # fmt: skip
    assert "me/cut has no embedding" in made.warnings[0]
    tied = shelf.model("t", llama(2, tied=True), config(2, tie_word_embeddings=True))
    bare = cut(shelf, tied, "0-1", with_embeddings=True, renumber=True).manifest
    made = build_merge(
        parse_recipe(passthrough(("t", 0, 1), ("bare", 1, 2))), {"t": tied, "bare": bare}, name="v", created=1,
        read_small=shelf.read, put_literal=shelf.put,
    )  # fmt: skip
    assert made.warnings == ("me/cut has no norm and head that cakefs knows by name",)
    odd = {"model.layer_norm.weight" if n == "model.norm.weight" else n: s for n, s in llama(2, tied=True).items()}
    xglm = shelf.model("x", odd, config(2, tie_word_embeddings=True))  # all that it has is in the merge
    assert merge(shelf, "model: x\nrepeat_map_raw: [0, 0, 1]\n", xglm).warnings == ()


def test_differing_constants_are_told(shelf: Shelf) -> None:
    a, b = shelf.model("a", llama(2), config(2)), shelf.model("b", llama(2), config(2, rope_theta=5.0))
    assert "rope_theta" in merge(shelf, passthrough(("a", 0, 1), ("b", 1, 2)), a, b).warnings[0]


def test_a_tensor_of_no_known_place_must_be_the_same_at_both_ends(shelf: Shelf) -> None:
    extra = {"mystery.weight": ("BF16", (2,))}
    a, b = (shelf.model(n, {**llama(2), **extra}, config(2)) for n in ("a", "b"))
    ends = passthrough(("a", 0, 1), ("b", 1, 2))
    assert (
        "mystery.weight, neither embedding nor head, is not known to be the same in a and b"
        in refused(shelf, ends, a, b).message
    )
    made = merge(shelf, passthrough(("a", 0, 1), ("b", 1, 2), ("a", 1, 2)), a, b).manifest
    assert shelf.tensors(made)["mystery.weight"] == shelf.tensors(a)["mystery.weight"]
    with pytest.raises(UserError):
        merge(shelf, ends, a, b, digest_of=lambda key: f"xxh3:{key.identity}")
    made = merge(shelf, ends, a, b, digest_of=lambda key: "xxh3:00").manifest  # a frozen vision tower
    assert shelf.tensors(made)["mystery.weight"] == shelf.tensors(a)["mystery.weight"]


# --- calculated on read ---------------------------------------------------------------------------------------------


def test_scale_calculates_only_where_it_applies(shelf: Shelf) -> None:
    model = shelf.model("a", llama(2), config(2))
    recipe = "merge_method: passthrough\nmodels: [{model: a, parameters: {scale: {filter: down_proj, value: 0.5}}}]\n"
    view = merge(shelf, recipe, model).manifest
    calculated = {t.name for t in view.tensors if t.span == COMPUTED}
    assert calculated == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    source, made = shelf.tensors(model), shelf.tensors(view)
    assert all(made[n] == b for n, b in source.items() if n not in calculated)
    for name in calculated:  # halving a BF16 lowers its exponent by one
        halves = [int.from_bytes(source[name][i : i + 2], "little") - 0x80 for i in range(0, len(source[name]), 2)]
        assert made[name] == b"".join(h.to_bytes(2, "little") for h in halves)
    assert decode_manifest(encode_manifest(view)) == view
    assert view.stack[0].note == "scaled"


def test_dtype_is_told_to_the_config(shelf: Shelf) -> None:
    model = shelf.model("a", llama(2, dtype="F32"), config(2, torch_dtype="float32"))
    view = merge(shelf, passthrough(("a", 0, 2), extra="dtype: float32\nout_dtype: bfloat16\n"), model).manifest
    assert {t.dtype for t in view.tensors} == {"BF16"} and shelf.config(view)["torch_dtype"] == "bfloat16"
    same = merge(shelf, passthrough(("a", 0, 2), extra="dtype: float32\n"), model).manifest
    assert all(t.span != COMPUTED for t in same.tensors)


def test_average_of_equal_models_is_the_model(shelf: Shelf) -> None:
    a = shelf.model("a", llama(2), config(2))
    b = shelf.model("a", llama(2), config(2, other=1))
    recipe = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: b}]\n"
    made = build_merge(
        parse_recipe(recipe), {"a": a, "b": b}, name="v", created=1, read_small=shelf.read, put_literal=shelf.put
    ).manifest
    assert shelf.tensors(made) == shelf.tensors(a)
    assert made.stack[0].note == "linear"


def test_a_base_without_others_is_itself(shelf: Shelf) -> None:
    a = shelf.model("a", llama(2), config(2))
    made = merge(shelf, "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: a}]\n", a).manifest
    assert shelf.tensors(made) == shelf.tensors(a)


def test_integers_and_quantized_weights(shelf: Shelf) -> None:
    whole = {**llama(1), "model.layers.0.mask": ("I64", (2,))}
    a, b = shelf.model("a", whole, config(1)), shelf.model("b", whole, config(1))
    half = "merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 0.5}}]\n"
    view = merge(shelf, half, a).manifest
    assert shelf.tensors(view)["model.layers.0.mask"] == shelf.tensors(a)["model.layers.0.mask"]
    both = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
    assert "model.layers.0.mask holds integers that differ" in refused(shelf, both, a, b).message
    packed = shelf.model("a", llama(1), config(1, quantization_config={"bits": 4}))
    assert "is quantized" in refused(shelf, half, packed).message
    for part, dtype in (("weight", "U32"), ("qweight", "I32"), ("weight", "U8")):  # no config says so
        unmarked = {**llama(1), f"model.layers.0.mlp.up_proj.{part}": (dtype, (2, 2))}
        assert "is quantized" in refused(shelf, half, shelf.model("a", unmarked, config(1))).message
    strange = shelf.model("a", {**llama(1), "model.layers.0.s": ("F8_E4M3", (2,))}, config(1))
    assert "model.layers.0.s is F8_E4M3" in refused(shelf, half, strange).message


def test_models_that_lack_each_others_tensors_are_not_averaged(shelf: Shelf) -> None:
    a = shelf.model("a", {**llama(1), "model.layers.0.bias": ("BF16", (2,))}, config(1))
    b = shelf.model("b", {**llama(1), "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (2,))}, config(1))
    recipe = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
    assert "b has no tensor that could be merged with model.layers.0.bias" in refused(shelf, recipe, a, b).message


# --- views of views -------------------------------------------------------------------------------------------------


def test_slices_merges_and_merges_of_them(shelf: Shelf) -> None:
    a, b = shelf.model("a", llama(6), config(6)), shelf.model("b", llama(6), config(6))
    bottom = cut(shelf, a, "0-2", with_embeddings=True, renumber=True).manifest
    top = cut(shelf, b, "3-5", with_head=True, renumber=True).manifest
    joined = build_merge(
        parse_recipe(passthrough(("bottom", 0, 3), ("top", 0, 3), ("bottom", 1, 2), ("top", 2, 3))),
        {"bottom": bottom, "top": top}, name="joined", created=1, read_small=shelf.read, put_literal=shelf.put,
    ).manifest  # fmt: skip
    direct = merge(shelf, passthrough(("a", 0, 3), ("b", 3, 6), ("a", 1, 2), ("b", 5, 6)), a, b).manifest
    assert shelf.read(joined, "model.safetensors") == shelf.read(direct, "model.safetensors")
    assert joined.stack == direct.stack  # drawn by what was published
    part = cut(shelf, joined, "5-6", renumber=True).manifest
    assert [(e.origins[0].model, e.origins[0].layer) for e in part.stack] == [("b", 5), ("a", 1)]
    assert (
        shelf.tensors(part)["model.layers.1.mlp.down_proj.weight"]
        == shelf.tensors(a)["model.layers.1.mlp.down_proj.weight"]
    )


def test_calculated_tensors_are_taken_further(shelf: Shelf) -> None:
    model = shelf.model("a", llama(3), config(3))
    scale = "merge_method: passthrough\nmodels: [{{model: {}, parameters: {{scale: {}}}}}]\n"
    once = merge(shelf, scale.format("a", 0.5), model).manifest
    twice = build_merge(
        parse_recipe(scale.format("once", 0.5)), {"once": once}, name="twice", created=1, read_small=shelf.read,
        put_literal=shelf.put,
    ).manifest  # fmt: skip
    assert shelf.tensors(twice) == shelf.tensors(merge(shelf, scale.format("a", 0.25), model).manifest)
    part = cut(shelf, twice, "1").manifest
    assert shelf.tensors(part).items() <= shelf.tensors(twice).items()
    assert part.stack[0] == StackLayer(1, (LayerOrigin("a", 1, "c0ffee"),), "scaled")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n", "from 1024 tensors"),
        ("merge_method: passthrough\nparameters: {scale: 0.9}\nmodels: [{model: a}]\n", "in 201 steps"),
    ],
)
def test_merges_of_merges_come_to_an_end(shelf: Shelf, recipe: str, said: str) -> None:
    """Each average has twice the inputs of the one before."""
    made, parsed = shelf.model("a", llama(1), config(1)), parse_recipe(recipe)
    with pytest.raises(UserError, match=f"would be calculated {said} on each read"):
        for _ in range(202):
            last = made
            made = build_merge(
                parsed, {"a": made, "b": made}, name="v", created=1, read_small=shelf.read, put_literal=shelf.put
            ).manifest
    assert shelf.tensors(last)


def test_a_view_needs_no_parent(shelf: Shelf) -> None:
    model = shelf.model("a", llama(3), config(3))
    view = merge(shelf, "model: a\nrepeat_map_raw: [0, 2]\n", model).manifest
    used = {view.key(s.span) for f in view.files for s in f.segments if not isinstance(s, Literal)}
    assert used <= {model.key(i) for i in range(len(model.spans))}
    assert all(source in model.sources for source in view.sources)
    assert len(view.spans) == len({view.key(i) for i in range(len(view.spans))})


# --- quantized models -----------------------------------------------------------------------------------------------


def test_names_in_quantization_settings_follow(shelf: Shelf) -> None:
    quantization = {"bits": 4, "modules_to_not_convert": ["model.layers.2.mlp", "lm_head"]}
    beside = b'{"quantization": {"exclude_modules": ["model.layers.1.self_attn"]}}'
    model = shelf.model(
        "a", llama(3), config(3, quantization_config=quantization), files={"hf_quant_config.json": beside}
    )
    view = merge(shelf, "model: a\nrepeat_map_raw: [0, 2, 1, 2]\n", model).manifest
    assert shelf.config(view)["quantization_config"]["modules_to_not_convert"] == [
        "lm_head", "model.layers.1.mlp", "model.layers.3.mlp",
    ]  # fmt: skip
    assert b"model.layers.2.self_attn" in shelf.read(view, "hf_quant_config.json")
