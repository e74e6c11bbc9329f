"""Merges held against mergekit itself, run on tiny models: the whole weight file by SHA-256."""

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from cakefs.formats.safetensors import parse_header
from cakefs.model import Manifest, View
from cakefs.plan.compute import evaluate, needs
from cakefs.plan.merge import build_merge
from cakefs.plan.recipe import parse_recipe, referenced
from tests.shelf import Shelf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("mergekit", reason="mergekit is not installed: pip install 'cakefs[oracle]'")
    import torch
    import transformers
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from mergekit.merge_methods import get as merge_method
    from mergekit.merge_methods.base import TensorEntry, TensorGroup

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


class Ours:
    """The virtual merge, put together in memory."""

    def __init__(self, zoo: Path, recipe: str) -> None:
        self.shelf = Shelf()
        parsed = parse_recipe(recipe)
        models = {ref.name: self._load(zoo / ref.name) for ref in referenced(parsed)}
        made = build_merge(parsed, models, name="v", created=1, read_small=self.shelf.read, put_literal=self.shelf.put)
        self.manifest: Manifest = made.manifest
        self.warnings = made.warnings

    def _load(self, path: Path) -> Manifest:
        return self.shelf.published(path.name, {file.name: file.read_bytes() for file in path.iterdir()})

    def weights(self) -> bytes:
        return self.shelf.read(self.manifest, "model.safetensors")

    def config(self) -> dict[str, Any]:
        return self.shelf.config(self.manifest)

    def save(self, target: Path) -> Path:
        for path in self.manifest.shown(View.MODEL):
            (target / path).write_bytes(self.shelf.read(self.manifest, path))
        return target


def theirs(zoo: Path, recipe: str, out: Path) -> Path:
    """mergekit's own result. Its config may be lacking: with layer_types it writes the weights, then fails."""

    def located(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: str(zoo / v) if k in ("model", "base_model") else located(v) for k, v in value.items()}
        return [located(v) for v in value] if isinstance(value, list) else value

    config = MergeConfiguration.model_validate(located(yaml.safe_load(recipe)))
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    try:
        run_merge(config, str(out), options)
    except Exception as error:
        if "num_hidden_layers" not in str(error):
            raise
    return out


def passthrough(*slices: tuple[str, int, int]) -> str:
    parts = "".join(f"- sources: [{{model: {m}, layer_range: [{a}, {b}]}}]\n" for m, a, b in slices)
    return f"merge_method: passthrough\nslices:\n{parts}"


RECIPES = {
    "llama": passthrough(("llama-a", 0, 6), ("llama-a", 3, 10)),
    "whole": passthrough(("llama-a", 0, 10)),
    "two models": passthrough(("llama-a", 0, 6), ("llama-b", 3, 10)),
    "three slices": passthrough(("llama-a", 0, 2), ("llama-b", 9, 10), ("llama-a", 4, 5)),
    "tied": passthrough(("tied-a", 0, 6), ("tied-a", 3, 10)),
    "tied models": "base_model: tied-a\n" + passthrough(("tied-a", 0, 6), ("tied-b", 3, 10)),
    "qwen2": passthrough(("qwen2", 0, 6), ("qwen2", 3, 10)),
    "qwen2 sliding": passthrough(("qwen2-sliding", 0, 6), ("qwen2-sliding", 3, 10)),
    "qwen3": passthrough(("qwen3", 0, 6), ("qwen3", 3, 10)),
    "gemma2": passthrough(("gemma2", 0, 6), ("gemma2", 3, 10)),
    "gpt2": passthrough(("gpt2", 0, 4), ("gpt2", 1, 6)),
    "mixed dtypes": passthrough(("llama-a", 0, 6), ("llama-f16", 3, 10)),
    "dtype": "dtype: float16\n" + passthrough(("llama-a", 0, 6), ("llama-f32", 3, 10)),
    "dtype and out_dtype": "dtype: float32\nout_dtype: bfloat16\n"
    + passthrough(("llama-f16", 0, 6), ("llama-a", 3, 10)),
    "scale": """\
merge_method: passthrough
slices:
- sources:
  - model: llama-a
    layer_range: [0, 6]
    parameters:
      scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: [0.1, 0.7, 0.3]}, {value: 1.0}]
- sources:
  - {model: llama-b, layer_range: [3, 4]}
  parameters: {scale: [{filter: q_proj, value: [0.3, 0.4]}]}
- sources:
  - {model: llama-b, layer_range: [3, 10]}
parameters: {scale: 0.9}
""",
    "scale gpt2": "merge_method: passthrough\nmodels: [{model: gpt2, parameters: {scale: 0.3}}]\n",
    "linear": """\
merge_method: linear
models:
- {model: llama-a, parameters: {weight: 0.3}}
- {model: llama-b, parameters: {weight: 0.45}}
""",
    "linear alone": "merge_method: linear\nmodels: [{model: llama-a, parameters: {weight: 0.3}}]\n",
    "linear, not divided, with gradients": """\
merge_method: linear
parameters: {normalize: false}
models:
- {model: llama-a, parameters: {weight: [0.3, 0.9]}}
- {model: llama-b, parameters: {weight: [{filter: mlp, value: 0.1}, {value: 0.45}]}}
""",
    "linear of three dtypes": """\
merge_method: linear
base_model: llama-a
parameters: {weight: 0.37}
models: [{model: llama-a}, {model: llama-f16}, {model: llama-f32, parameters: {weight: 0.45}}]
""",
    "linear, narrowed": """\
merge_method: linear
dtype: float32
out_dtype: bfloat16
parameters: {weight: 0.37}
models: [{model: llama-a}, {model: llama-f16}, {model: llama-f32, parameters: {weight: 0.45}}]
""",
    "linear in float64": """\
merge_method: linear
dtype: float64
out_dtype: float16
parameters: {weight: 0.37}
models: [{model: llama-a}, {model: llama-b, parameters: {weight: 0.2}}, {model: llama-f32}]
""",
    "linear slices": """\
merge_method: linear
slices:
- sources:
  - {model: llama-a, layer_range: [0, 4], parameters: {weight: 1}}
  - {model: llama-b, layer_range: [2, 6], parameters: {weight: 0.5}}
- sources:
  - {model: llama-b, layer_range: [6, 9], parameters: {weight: 1}}
  - {model: llama-a, layer_range: [7, 10], parameters: {weight: 0.25}}
""",
    "linear qwen3": "merge_method: linear\nparameters: {weight: 0.3}\nmodels: [{model: qwen3}]\n",
    "task": """\
merge_method: task_arithmetic
base_model: llama-a
models:
- {model: llama-b, parameters: {weight: 0.3}}
- {model: llama-a}
- {model: llama-f16, parameters: {weight: [0.1, 0.45]}}
""",
    "task, base not listed": """\
merge_method: task_arithmetic
base_model: llama-a
parameters: {lambda: 0.7, normalize: true}
models: [{model: llama-b, parameters: {weight: 0.3}}]
""",
    "task, narrowed": """\
merge_method: task_arithmetic
base_model: llama-a
dtype: float64
out_dtype: float16
parameters: {lambda: 0.7, normalize: true, weight: 0.3}
models: [{model: llama-b}, {model: llama-f32}]
""",
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_file_is_mergekits(zoo: Path, tmp_path: Path, recipe: str) -> None:
    ours = Ours(zoo, recipe)
    expected = (theirs(zoo, recipe, tmp_path) / "model.safetensors").read_bytes()
    assert tensor_differences(ours.weights(), expected) == []
    assert hashlib.sha256(ours.weights()).digest() == hashlib.sha256(expected).digest()
    written = tmp_path / "config.json"
    if written.exists():
        config, other = ours.config(), json.loads(written.read_text())
        count = "n_layer" if "n_layer" in other else "num_hidden_layers"
        assert config[count] == other[count]


def tensor_differences(ours: bytes, theirs: bytes) -> list[str]:
    tables = []
    for data in (ours, theirs):
        header = parse_header(data, len(data), "model.safetensors")
        tables.append(
            {e.name: (e.dtype, e.shape, data[header.size + e.start : header.size + e.stop]) for e in header.entries}
        )
    return sorted(name for name in {*tables[0], *tables[1]} if tables[0].get(name) != tables[1].get(name))


MIXTRAL = passthrough(("mixtral", 0, 3), ("mixtral", 1, 4))


def test_experts_are_mergekits_once_fused(zoo: Path, tmp_path: Path) -> None:
    expected = theirs(zoo, MIXTRAL, tmp_path) / "model.safetensors"
    assert differences_once_fused(Ours(zoo, MIXTRAL).weights(), expected.read_bytes()) == []


def differences_once_fused(ours: bytes, theirs: bytes) -> list[str]:
    """mergekit writes mixtral as transformers holds it in memory, we as it is on disk."""
    from safetensors.torch import load

    fused: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
    for name, tensor in load(ours).items():
        match = re.fullmatch(r"(model\.layers\.\d+)\.block_sparse_moe\.(?:gate|experts\.(\d+)\.(w\d))\.weight", name)
        if match is None:
            fused[name] = tensor
        elif match[2] is None:
            fused[f"{match[1]}.mlp.gate.weight"] = tensor
        else:
            experts.setdefault(match[1], {})[match[3], int(match[2])] = tensor
    for layer, parts in experts.items():
        both = [torch.cat([parts["w1", e], parts["w3", e]]) for e in range(4)]
        fused[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        fused[f"{layer}.mlp.experts.down_proj"] = torch.stack([parts["w2", e] for e in range(4)])
    expected = load(theirs)
    return sorted(
        name
        for name in {*fused, *expected}
        if name not in fused or name not in expected or not torch.equal(fused[name], expected[name])
    )


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama-a", [0, 1, 2, 1, 2, 3, 2, 3, 4]),
        ("qwen2", [0, 1, 2, 3, 2, 3, 9]),
        ("qwen2-sliding", [0, 6, 1, 7, 9, 2]),
        ("qwen3", [0, 1, 1, 5]),
        ("gemma2", [0, 2, 2, 1, 5]),
        ("mixtral", [0, 1, 0, 3]),
        ("gpt2", [0, 1, 1, 5]),
    ],
)
def test_it_loads_with_the_logits_of_a_stack_in_memory(zoo: Path, tmp_path: Path, name: str, layers: list[int]) -> None:
    auto = transformers.AutoModelForCausalLM
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    made = Ours(zoo, f"model: {name}\nrepeat_map_raw: {layers}\n").save(tmp_path)
    model, info = auto.from_pretrained(made, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    source = auto.from_pretrained(zoo / name, **options)
    config = source.config
    setattr(config, "n_layer" if name == "gpt2" else "num_hidden_layers", len(layers))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    stack = type(source)(config).eval()
    state = {k: v for k, v in source.state_dict().items() if not re.search(r"\.(layers|h)\.\d+\.", k)}
    for number, layer in enumerate(layers):
        for key, value in source.state_dict().items():
            if re.search(rf"\.(layers|h)\.{layer}\.", key):
                state[re.sub(rf"\.(layers|h)\.{layer}\.", rf".\1.{number}.", key, count=1)] = value
    stack.load_state_dict(state)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens, use_cache=False).logits, stack(tokens, use_cache=False).logits)


# --- element by element ---------------------------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
COUNT = 120_000


def noise(dtype: str, seed: int) -> torch.Tensor:
    """A third any bits at all (subnormal, infinite, NaN too), the rest as weights are."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**63), 2**63 - 1, (COUNT,), generator=generator)
    normal = torch.randn(COUNT, generator=generator, dtype=torch.float64) * 0.02
    kind = DTYPES[dtype]
    return torch.cat([bits.view(kind)[: COUNT // 3], normal.to(kind)[COUNT // 3 :]])


def raw(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data


def calculate(op: str, dtype: str, params: tuple[float, ...], inputs: list[torch.Tensor]) -> torch.Tensor:
    from cakefs.model import Computed, Extent

    names = {kind: name for name, kind in DTYPES.items()}
    dtypes = tuple(names[tensor.dtype] for tensor in inputs)
    size = COUNT * DTYPES[dtype].itemsize
    node = Computed(op, dtype, size, tuple(Extent(i, 0, 0) for i in range(len(inputs))), dtypes, params)
    data = [raw(tensor)[need.start : need.stop] for tensor, need in zip(inputs, needs(node, 0, size), strict=True)]
    return torch.frombuffer(bytearray(evaluate(node, 0, size, data)), dtype=DTYPES[dtype])


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal bits, but for the payload of NaNs."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    unequal = ours.view(integers) != theirs.view(integers)
    return not bool((unequal & ~(torch.isnan(ours) & torch.isnan(theirs))).any())


def run(method: str, inputs: list[torch.Tensor], parameters: dict[str, Any], base: int | None = None) -> torch.Tensor:
    entries = tuple(TensorEntry(id=i, tensor=t, is_base=i == base) for i, t in enumerate(inputs))
    (result,) = merge_method(method)((TensorGroup(entries=entries),), parameters=parameters)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_casts(dtype: str) -> None:
    values = noise(dtype, 1)
    for factor in (0.5, 0.1, 1 / 3, 1e-3, -2.7):
        assert same(calculate("scale", dtype, (factor,), [values]), values * factor)
    for other, kind in DTYPES.items():
        assert same(calculate("cast", other, (), [values]), values.to(kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(0.3,), (0.5, 0.5), (0.3, 1.1, -0.2), tuple(0.1 * k + 0.05 for k in range(9))])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(dtype: str, weights: tuple[float, ...], normalize: bool) -> None:
    inputs = [noise(dtype, seed) for seed in range(len(weights))]
    parameters = {"weight": dict(enumerate(weights)), "normalize": normalize}
    expected = run("linear", inputs, parameters)
    assert same(calculate("linear", dtype, (float(normalize), *weights), inputs), expected)


@pytest.mark.parametrize("hair", [2**-23, -(2**-24), 2**-22])
@pytest.mark.parametrize("sign", [1, -1])
def test_linear_beside_the_middle_of_two_numbers(hair: float, sign: int) -> None:
    generator = torch.Generator().manual_seed(5)
    totals = torch.randn(COUNT, generator=generator) * torch.exp(torch.randn(COUNT, generator=generator) * 5)
    units = torch.nextafter(totals.abs(), torch.full_like(totals, float("inf"))) - totals.abs()
    values = units / 2 * (1 + hair) * sign
    weight = float(torch.tensor(1 - hair, dtype=torch.float32))
    expected = run("linear", [totals, values], {"weight": {0: 1.0, 1: weight}, "normalize": False})
    assert same(calculate("linear", "F32", (0.0, 1.0, weight), [totals, values]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(0.3,), (0.5, -0.2), (0.3, 1.1, -0.2, 0.7)])
@pytest.mark.parametrize(("normalize", "factor"), [(False, 1.0), (True, 0.7), (False, 0.3)])
def test_task_arithmetic(dtype: str, weights: tuple[float, ...], normalize: bool, factor: float) -> None:
    inputs = [noise(dtype, seed) for seed in range(len(weights) + 1)]
    given = {"weight": {i + 1: w for i, w in enumerate(weights)}, "normalize": normalize, "lambda": factor}
    expected = run("task_arithmetic", inputs, given, base=0)
    assert same(calculate("task_arithmetic", dtype, (float(normalize), factor, *weights), inputs), expected)
