"""torch checkpoints that torch wrote: tensor by tensor what `torch.load` gives, in every variant of `torch.save`."""

import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from cakefs.errors import InvalidFormat
from tests import official
from tests.test_formats_torch import gathered, read

pytestmark = [pytest.mark.loaders, pytest.mark.filterwarnings("ignore")]  # torch warns of types and protocols
torch = pytest.importorskip("torch", reason="needs torch (the `loaders` extra)")
safetensors_torch = pytest.importorskip("safetensors.torch")

VARIANTS: dict[str, Callable[[Any], bytes]] = {}


def variant(name: str, **options: Any) -> None:
    def save(value: Any) -> bytes:
        file = io.BytesIO()
        torch.save(value, file, **options)
        return file.getvalue()

    VARIANTS[name] = save


variant("zip")
variant("legacy", _use_new_zipfile_serialization=False)
for protocol in (3, 4, 5):
    variant(f"zip, protocol {protocol}", pickle_protocol=protocol)
    variant(f"legacy, protocol {protocol}", pickle_protocol=protocol, _use_new_zipfile_serialization=False)

every = pytest.mark.parametrize("save", VARIANTS.values(), ids=list(VARIANTS))


def ours(file: bytes) -> dict[str, official.Tensor]:
    found = read(file)
    return {v.name: official.Tensor(v.dtype, v.shape, gathered(file, found, v)) for v in found.tensors}


def theirs(tensors: dict[str, Any]) -> dict[str, official.Tensor] | None:
    plain = {n: t.detach().clone(memory_format=torch.contiguous_format).contiguous() for n, t in tensors.items()}
    return official.read(safetensors_torch.save(plain))


def values(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def views() -> dict[str, Any]:
    base = values(6, 8)
    return {
        "base": base, "tied": base, "row": base[3], "rows": base[1:3], "columns": base[:, 2:5], "turned": base.t(),
        "steps": base[::2, ::3], "expanded": base[:1].expand(5, 8), "scalar": base[2, 3], "empty": base[:0],
        "mixed": values(2, 3, 4).permute(2, 0, 1), "unfolded": values(10).unfold(0, 4, 2), "one": values(1, 1, 7),
        "last": values(4, 2, 3).to(memory_format=torch.contiguous_format).transpose(0, 1),
    }  # fmt: skip


@every
def test_views(save: Callable[[Any], bytes]) -> None:
    assert ours(save(views())) == theirs(views())


def test_as_weights_only_loads_it() -> None:
    for name in ("zip", "legacy"):
        file = VARIANTS[name](views())
        loaded = torch.load(io.BytesIO(file), weights_only=True)
        assert ours(file) == theirs(loaded)


TYPES = [
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
    "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu",
]  # fmt: skip


@every
def test_types(save: Callable[[Any], bytes]) -> None:
    raw = torch.arange(48, dtype=torch.uint8)
    tensors = {name: (raw % 2).view(torch.bool) if name == "bool" else raw.view(getattr(torch, name)) for name in TYPES}
    tensors = {name: t.clone() for name, t in tensors.items()}
    tensors |= {f"{name} part": tensors[name][2:5] for name in TYPES}
    assert ours(save(tensors)) == theirs(tensors)


@every
def test_modules_and_training_states(save: Callable[[Any], bytes]) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Embedding(5, 4))
    state = module.state_dict()
    assert ours(save(state)) == theirs(state)
    parameters = OrderedDict(module.named_parameters())
    assert ours(save(parameters)) == theirs(parameters)
    trained = {"state_dict": state, "epoch": 3, "lr": 0.1, "name": "x", "history": [1.0, 2], "none": None, "big": 2**70}
    trained |= {"optimizer": {"state": {0: {"exp_avg": values(3)}}, "groups": [{"lr": 0.1}]}, "shape": torch.Size([1])}
    found = read(save(trained))
    assert ours(save(trained)) == theirs(state)
    assert set(found.skipped) == trained.keys() - {"state_dict"}


@every
def test_tensors_with_attributes(save: Callable[[Any], bytes]) -> None:
    parameter = torch.nn.Parameter(values(3))
    parameter.tag = "x"
    tensor = values(4)
    tensor.tag = [1, 2]
    assert ours(save({"a": parameter, "b": tensor})) == theirs({"a": parameter, "b": tensor})


@every
def test_many_tensors(save: Callable[[Any], bytes]) -> None:
    """Directory and pickle are longer than the first look at the file."""
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": values(3, 5, seed=i) for i in range(700)}
    assert ours(save(tensors)) == theirs(tensors)


def test_names_of_other_scripts_and_files_of_other_names(tmp_path: Any) -> None:
    torch.save({"模型.🍰": values(3)}, tmp_path / "wéights-模.bin")
    assert ours((tmp_path / "wéights-模.bin").read_bytes()) == theirs({"模型.🍰": values(3)})


@every
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.complex(values(3), values(3)).conj(), "lazy 'conj'"),
        (lambda: torch.complex(values(3), values(3)).conj().imag, "lazy 'neg'"),
        (lambda: values(3).to(torch.complex128), "a type that safetensors does not have"),
        (lambda: values(3, 3).to_sparse(), "_rebuild_sparse_tensor"),
        (lambda: torch.quantize_per_tensor(values(4), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
        (lambda: torch.empty(3, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda: torch.nn.Linear(2, 2), "refers to "),
    ],
)
def test_what_is_no_plain_tensor_is_refused(make: Callable[[], Any], reason: str, save: Callable[[Any], bytes]) -> None:
    with pytest.raises(InvalidFormat, match=reason):
        read(save({"a": make(), "b": values(3)}))


def test_a_script_is_refused() -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(InvalidFormat, match=r"is deflated|TorchScript"):
        read(file.getvalue())
