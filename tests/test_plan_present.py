"""What of a repository is shown where: one form of the weights per directory."""

import pytest

from cakefs.errors import InvalidFormat
from cakefs.formats.sharded import Index
from cakefs.model import View
from cakefs.plan.present import (
    arrange,
    checkpoint_files,
    is_safetensors,
    main_files,
    wanted_checkpoints,
    wanted_indexes,
)

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def index_of(*shards: str) -> Index:
    return Index({f"t{n}": shard for n, shard in enumerate(shards)}, {})


def shown(paths: list[str], indexes: dict[str, Index] | None = None, view: View = View.MODEL) -> dict[str, str]:
    """Shown path -> what it is made from, with a + where it is merged."""
    files = arrange(paths, indexes or {})
    return {f.path: f.origin + "+" * f.merged for f in files if f.view in (View.BOTH, view)}


def same(*paths: str) -> dict[str, str]:
    return {path: path for path in paths}


@pytest.mark.parametrize(
    ("published", "model"),
    [
        pytest.param(["model.safetensors", "config.json"], same("model.safetensors", "config.json"), id="single"),
        pytest.param(["model.safetensors", "model.fp16.safetensors"], same("model.safetensors"), id="variant beside"),
        pytest.param(
            ["model.safetensors", "adapter_model.safetensors"], same("model.safetensors"), id="adapter beside"
        ),
        pytest.param(["adapter_model.safetensors"], same("adapter_model.safetensors"), id="adapter alone"),
        pytest.param(
            ["model.safetensors", "pytorch_model.bin", "a.pt", "b.pth", "c.ckpt", "pytorch_model.bin.index.json"],
            same("model.safetensors"),
            id="pickles beside",
        ),
        pytest.param(
            ["model.safetensors", INDEX, *SHARDS, "model.safetensors.index.fp16.json"],
            same("model.safetensors"),
            id="single, index and shards",
        ),
        pytest.param(["model.safetensors", INDEX], same("model.safetensors"), id="single and a stale index"),
        pytest.param(
            ["model.safetensors", "onnx/model.onnx", "openvino/openvino_model.bin", "tf_model.h5", "binary.txt"],
            same("model.safetensors", "onnx/model.onnx", "openvino/openvino_model.bin", "tf_model.h5", "binary.txt"),
            id="other directories and other files are left alone",
        ),
        pytest.param(
            ["adapter_model.safetensors", "adapter_model.bin", "training_args.bin"],
            same("adapter_model.safetensors", "training_args.bin"),
            id="pickle beside the safetensors of its kind",
        ),
        pytest.param(
            ["optimizer.pt", "last.ckpt", "consolidated.00.pth", "pytorch_model-00001-of-00002.bin"],
            same("optimizer.pt", "last.ckpt", "consolidated.00.pth", "pytorch_model-00001-of-00002.bin"),
            id="pickles that no loader takes for the model",
        ),
        pytest.param(
            ["pytorch_model.safetensors", "pytorch_model.bin"],
            {"model.safetensors": "pytorch_model.safetensors"},
            id="first fallback",
        ),
        pytest.param(
            ["sub/model-00001-of-00001.safetensors"],
            {"sub/model.safetensors": "sub/model-00001-of-00001.safetensors"},
            id="second fallback, in a directory",
        ),
        pytest.param(
            ["pytorch_model.safetensors", "model-00001-of-00001.safetensors"],
            {"model.safetensors": "pytorch_model.safetensors"},
            id="both fallbacks",
        ),
        pytest.param(
            ["pytorch_model.safetensors", "model.safetensors"], same("model.safetensors"), id="fallback beside single"
        ),
        pytest.param(SHARDS, same(*SHARDS), id="shards without an index"),
        pytest.param(
            ["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"],
            same("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"),
            id="diffusers variants",
        ),
        pytest.param(
            [
                "unet/x.safetensors",
                "unet/x.safetensors.index.json",
                "unet/x-00001-of-00002.safetensors",
                "unet/x-00002-of-00002.safetensors",
                "unet/xx-00001-of-00002.safetensors",
            ],
            same("unet/x.safetensors", "unet/xx-00001-of-00002.safetensors"),
            id="another single with its index and shards",
        ),
        pytest.param([], {}, id="nothing"),
    ],
)
def test_without_a_merge(published: list[str], model: dict[str, str]) -> None:
    assert wanted_indexes(published) == []
    assert shown(published) == model
    assert shown(published, view=View.ORIGINAL) == same(*published)


@pytest.mark.parametrize(
    ("published", "indexes", "model"),
    [
        pytest.param(
            [INDEX, *SHARDS, "config.json"],
            {INDEX: SHARDS},
            {"model.safetensors": f"{INDEX}+", "config.json": "config.json"},
            id="plain",
        ),
        pytest.param(
            [INDEX, *SHARDS, "pytorch_model.bin", "consolidated.safetensors", "model.safetensors.index.fp16.json"],
            {INDEX: SHARDS},
            {"model.safetensors": f"{INDEX}+"},
            id="nothing else beside the merged file",
        ),
        pytest.param(
            [INDEX, "weights/a", "weights/b.safetensors", "weights/c.bin"],
            {INDEX: ["weights/a", "weights/b.safetensors"]},
            {"model.safetensors": f"{INDEX}+", "weights/c.bin": "weights/c.bin"},
            id="shards with odd names in a subdirectory",
        ),
        pytest.param(
            [f"sub/{INDEX}", "sub/x/y.safetensors"],
            {f"sub/{INDEX}": ["x/y.safetensors"]},
            {"sub/model.safetensors": f"sub/{INDEX}+"},
            id="index in a subdirectory",
        ),
        pytest.param(
            [INDEX, "model-00001-of-00001.safetensors", "pytorch_model.safetensors"],
            {INDEX: ["model-00001-of-00001.safetensors"]},
            {"model.safetensors": f"{INDEX}+"},
            id="an index wins over the fallbacks",
        ),
        pytest.param(
            [INDEX, "sub/model-00001-of-00001.safetensors"],
            {INDEX: ["sub/model-00001-of-00001.safetensors"]},
            {"model.safetensors": f"{INDEX}+"},
            id="a shard is no fallback",
        ),
        pytest.param(
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors", "other.safetensors"],
            {"model.safetensors.index.fp16.json": ["model.fp16-00001-of-00001.safetensors"]},
            {"model.fp16.safetensors": "model.safetensors.index.fp16.json+", "other.safetensors": "other.safetensors"},
            id="variant alone",
        ),
        pytest.param(
            ["t/y.safetensors.index.json", "t/y-1-of-1.safetensors", "t/y.bin"],
            {"t/y.safetensors.index.json": ["y-1-of-1.safetensors"]},
            {"t/y.safetensors": "t/y.safetensors.index.json+", "t/y.bin": "t/y.bin"},
            id="another stem hides only its shards",
        ),
    ],
)
def test_with_a_merge(published: list[str], indexes: dict[str, list[str]], model: dict[str, str]) -> None:
    assert wanted_indexes(published) == sorted(indexes)
    parsed = {path: index_of(*shards) for path, shards in indexes.items()}
    assert shown(published, parsed) == model
    assert shown(published, parsed, View.ORIGINAL) == same(*published)


def test_a_variants_index_is_not_merged_where_model_safetensors_is_shown() -> None:
    variant = "model.safetensors.index.fp16.json"
    for other in ("model.safetensors", "pytorch_model.safetensors"):
        assert wanted_indexes([variant, other]) == []
    assert wanted_indexes([variant, INDEX]) == [INDEX]
    assert wanted_indexes([variant, "sub/model.safetensors"]) == [variant]


def test_files_come_by_path() -> None:
    files = arrange(["b", INDEX, *SHARDS, "a", "é", "B"], {INDEX: index_of(*SHARDS)})
    assert [f.path for f in files] == sorted(f.path for f in files)


def test_two_indexes_of_one_file_are_refused_by_name() -> None:
    names = ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"]
    with pytest.raises(InvalidFormat) as caught:
        wanted_indexes(names)
    assert caught.value.message == f"both {names[0]} and {names[1]} are an index of model.fp16.safetensors"


@pytest.mark.parametrize("paths", [["a", "a/b"], ["a/b/c", "a/b"], [INDEX, SHARDS[0], "model.safetensors/x"]])
def test_a_path_that_is_file_and_directory_is_refused(paths: list[str]) -> None:
    indexes = {INDEX: index_of(SHARDS[0])} if INDEX in paths else {}
    with pytest.raises(InvalidFormat, match="is both a file and a directory"):
        arrange(paths, indexes)


def test_what_must_have_a_header() -> None:
    assert is_safetensors("a/b.safetensors")
    assert not any(map(is_safetensors, ["a.safetensors.index.json", "a.bin", "a.safetensors/b", "safetensors"]))


# --- torch ------------------------------------------------------------------------------------------------------------

TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


@pytest.mark.parametrize(
    ("published", "wanted"),
    [
        (["pytorch_model.bin"], {"model.safetensors": "pytorch_model.bin"}),
        (["pytorch_model.bin", TORCH_INDEX, *TORCH_SHARDS], {"model.safetensors": "pytorch_model.bin"}),
        ([TORCH_INDEX, *TORCH_SHARDS], {"model.safetensors": TORCH_INDEX}),
        (["a/pytorch_model.bin"], {"a/model.safetensors": "a/pytorch_model.bin"}),
        (["pytorch_model.bin", "pytorch_model.fp16.bin"], {"model.safetensors": "pytorch_model.bin"}),
        (["pytorch_model.fp16.bin"], {"model.fp16.safetensors": "pytorch_model.fp16.bin"}),
        (["adapter_model.bin"], {"adapter_model.safetensors": "adapter_model.bin"}),
        (["adapter_model.bin", "pytorch_model.bin"], {"model.safetensors": "pytorch_model.bin"}),
        (
            ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"],
            {
                "diffusion_pytorch_model.safetensors": "diffusion_pytorch_model.bin",
                "diffusion_pytorch_model.fp16.safetensors": "diffusion_pytorch_model.fp16.bin",
            },
        ),
        (["pytorch_model.bin", "model.safetensors"], {}),
        (["pytorch_model.bin", INDEX, *SHARDS], {}),
        (["pytorch_model.bin", *SHARDS], {}),
        (["pytorch_model.bin", "pytorch_model.safetensors"], {}),
        (["pytorch_model.bin", "model.safetensors.index.fp16.json"], {}),
        (["pytorch_model.bin", "sub/model.safetensors"], {"model.safetensors": "pytorch_model.bin"}),
        (TORCH_SHARDS, {}),
    ],
)
def test_checkpoints_stand_in_where_there_are_no_safetensors(published: list[str], wanted: dict[str, str]) -> None:
    assert wanted_checkpoints(published) == wanted


def test_a_checkpoint_is_never_shown_in_the_model() -> None:
    """Neither where it is converted nor where it cannot be; its index and shards go with it."""
    published = [TORCH_INDEX, *TORCH_SHARDS, "config.json", "old.pt"]
    indexes = {TORCH_INDEX: index_of(*TORCH_SHARDS)}
    assert checkpoint_files(wanted_checkpoints(published), indexes) == set(TORCH_SHARDS)
    done = {f.path: f.origin for f in arrange(published, indexes, ["model.safetensors"]) if f.view is not View.ORIGINAL}
    assert done == {"model.safetensors": TORCH_INDEX, "config.json": "config.json"}
    for known in (indexes, {}):
        assert shown(published, known) == same("config.json", "old.pt")
        assert shown(published, known, View.ORIGINAL) == same(*published)


def test_an_index_of_checkpoints_hides_nothing_else() -> None:
    indexes = {TORCH_INDEX: index_of("config.json", "odd/name.pt", TORCH_SHARDS[0])}
    published = [TORCH_INDEX, *TORCH_SHARDS, "odd/name.pt", "config.json"]
    assert shown(published, indexes) == same("config.json")


@pytest.mark.parametrize(
    ("published", "main"),
    [
        (["model.safetensors", "other.safetensors"], {"model.safetensors"}),
        (["a/model.safetensors", "b.safetensors"], {"a/model.safetensors"}),
        ([INDEX, *SHARDS, "extra.safetensors"], set(SHARDS)),
        (["model.safetensors", INDEX, *SHARDS], {"model.safetensors"}),
        (["pytorch_model.safetensors", "x.safetensors"], {"pytorch_model.safetensors"}),
        (["lora.safetensors"], {"lora.safetensors"}),
        (["unet/a.safetensors", "vae/b.safetensors"], set()),
        (["x.gguf"], set()),
    ],
)
def test_what_a_model_cannot_do_without(published: list[str], main: set[str]) -> None:
    indexes = {INDEX: index_of(*SHARDS)} if wanted_indexes(published) else {}
    assert main_files(published, indexes) == main
