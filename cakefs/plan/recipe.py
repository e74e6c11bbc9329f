"""Recipe text -> checked recipe. Pure; whether models and layers exist is for `plan/merge.py`.

Two forms are read: ours (`model` with `ratio_repeat` or `repeat_map_raw`, and `mode`) and mergekit's YAML for the
methods whose elements can be calculated one by one. Every refusal names the entry by its path in the YAML. What
mergekit would let through without effect (unknown keys, parameters of another method) is refused: a misspelt `scael`
scales nothing.

One key is our own in mergekit's form: `head: MODEL` names whose head is used where tied and untied models meet.
"""

from collections.abc import Collection, Mapping
from decimal import Decimal
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, NamedTuple

from cakefs.errors import UserError
from cakefs.formats.strictjson import brief
from cakefs.formats.strictyaml import decode_yaml
from cakefs.plan.ratio import Mode, Ratio, check_ratios, parse_map, parse_ratio, parse_ratios
from cakefs.plan.settings import METHODS, Settings, known_parameters, parse_setting

_OWN_KEYS = ("model", "ratio_repeat", "repeat_map_raw", "mode")
_KEYS = ("merge_method", "slices", "models", "base_model", "dtype", "out_dtype", "parameters", "head")
_REFUSED_KEYS = {
    "modules": "write `slices` or `models` at the top level",
    "tokenizer": "it would rewrite embeddings row by row; without it the first model's tokenizer is used",
    "tokenizer_source": "it would rewrite embeddings row by row; without it the first model's tokenizer is used",
    "chat_template": "the template is that of the first model (or base_model)",
}
_OTHER_METHODS = {
    "slerp": "needs sums over whole tensors", "nuslerp": "needs sums over whole tensors",
    "multislerp": "needs sums over whole tensors", "karcher": "needs sums over whole tensors",
    "model_stock": "needs sums over whole tensors", "sce": "needs sums over whole tensors",
    "ram": "needs sums over whole tensors", "nearswap": "is not built", "arcee_fusion": "needs a threshold per tensor",
    "ties": "needs a threshold per tensor", "breadcrumbs": "needs a threshold per tensor",
    "dare_ties": "is random", "dare_linear": "is random", "della": "is random", "della_linear": "is random",
}  # fmt: skip
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_LAYER_LIMIT = 100_000
_NOTHING: Settings = MappingProxyType({})


class ModelRef(NamedTuple):
    """A model as the recipe names it (`org/name` or `org/name@rev`); `where` is the path of the entry."""

    name: str
    where: str


class SourceSlice(NamedTuple):
    """Layers `[start, stop)` of a model; all of them where `stop` is None."""

    model: ModelRef
    start: int
    stop: int | None
    settings: Settings
    where: str


class OutputSlice(NamedTuple):
    """Consecutive layers of the output: one source, or several that are merged layer by layer."""

    sources: tuple[SourceSlice, ...]
    base: ModelRef | None
    settings: Settings
    where: str


class Stack(NamedTuple):
    """mergekit's form. `dtype` and `out_dtype` as safetensors spells them, or empty."""

    method: str
    slices: tuple[OutputSlice, ...]
    base: ModelRef | None = None
    dtype: str = ""
    out_dtype: str = ""
    settings: Settings = _NOTHING
    head: ModelRef | None = None
    warnings: tuple[str, ...] = ()


class Repeat(NamedTuple):
    """One model whose layers repeat: as `layers` lists them, else by `ratios`."""

    model: ModelRef
    layers: tuple[int, ...] | None = None
    ratios: tuple[Ratio, ...] = ()
    mode: Mode = Mode.README
    warnings: tuple[str, ...] = ()


Recipe = Stack | Repeat


def parse_recipe(text: str) -> Recipe:
    """Raises UserError, naming the YAML path, for anything that has no meaning or another than it seems."""
    try:
        document = decode_yaml(text)
    except ValueError as error:
        raise UserError(f"recipe: {error}") from error
    if type(document) is not dict or not document:
        raise UserError(
            "recipe: not a mapping", hint="start with `merge_method: passthrough`, or with `model: org/name`"
        )
    if "merge_method" in document:
        return _Parser(document).stack()
    if any(key in document for key in _OWN_KEYS):
        return _repeat(document)
    _refuse_unknown(document, (*_KEYS, *_OWN_KEYS), "")
    raise UserError("recipe: no merge_method", hint=f"one of {', '.join(METHODS)}; or `model` with `ratio_repeat`")


def referenced(recipe: Recipe) -> tuple[ModelRef, ...]:
    """Every model once, in the order of the text; what is named apart from the layers comes last."""
    if isinstance(recipe, Repeat):
        return (recipe.model,)
    refs = [source.model for part in recipe.slices for source in part.sources]
    refs += [ref for ref in (recipe.base, *(part.base for part in recipe.slices), recipe.head) if ref is not None]
    return tuple({ref.name: ref for ref in reversed(refs)}.values())[::-1]


# --- our form -------------------------------------------------------------------------------------------------------


def _repeat(document: Mapping[str, Any]) -> Repeat:
    _refuse_unknown(document, _OWN_KEYS, "")
    model = _model(document.get("model"), "model")
    mode = _mode(document.get("mode", Mode.README.value))
    raw, ratios = document.get("repeat_map_raw"), document.get("ratio_repeat")
    if raw is None and ratios is None:
        raise UserError("recipe: neither ratio_repeat nor repeat_map_raw", hint="ratio_repeat: '0:.3,.2:.4,.4:1'")
    if raw is None:
        checked = _ratios(ratios)
        check_ratios(checked, mode)
        return Repeat(model, ratios=checked, mode=mode)
    warnings = () if ratios is None else ("ratio_repeat has no effect beside repeat_map_raw",)
    return Repeat(model, layers=_raw_map(raw), mode=mode, warnings=warnings)


def _mode(value: object) -> Mode:
    try:
        return Mode(value)  # type: ignore[arg-type]
    except ValueError:
        raise UserError(f"mode: {brief(value)} is unknown", hint=f"one of {', '.join(Mode)}") from None


def _ratios(value: object) -> tuple[Ratio, ...]:
    if type(value) is str:
        return parse_ratios(value)
    entries = _list(value, "ratio_repeat", "pairs such as [0, .3]")
    ratios = []
    for i, entry in enumerate(entries):
        where = f"ratio_repeat[{i}]"
        if type(entry) is str:
            ratios.append(parse_ratio(entry, where))
            continue
        if type(entry) is not list or len(entry) != 2:
            raise UserError(f"{where}: {brief(entry)} is not a pair [start, end]")
        for k, number in enumerate(entry):
            if type(number) is not int and not isinstance(number, Decimal):
                raise UserError(f"{where}[{k}]: {brief(number)} is not a number")
        ratios.append(Ratio(Decimal(entry[0]), Decimal(entry[1]), where))
    return tuple(ratios)


def _raw_map(value: object) -> tuple[int, ...]:
    if type(value) is str and "," in value:  # as on the command line
        return parse_map(value)
    entries = _list(value, "repeat_map_raw", "layer numbers")
    return tuple(_count(entry, f"repeat_map_raw[{i}]") for i, entry in enumerate(entries))


# --- mergekit's form ------------------------------------------------------------------------------------------------


class _Parser:
    """One pass over the document; gathers warnings."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._warnings: list[str] = []
        self._method = ""

    def stack(self) -> Stack:
        document = self._document
        for key, hint in _REFUSED_KEYS.items():
            if document.get(key) is not None:
                raise UserError(f"{key}: not supported", hint=hint)
        _refuse_unknown(document, (*_KEYS, *_REFUSED_KEYS), "")
        self._method = _method(document["merge_method"])
        base = None if document.get("base_model") is None else _model(document["base_model"], "base_model")
        head = None if document.get("head") is None else _model(document["head"], "head")
        given = [key for key in ("slices", "models") if document.get(key) is not None]
        if len(given) != 1:
            raise UserError(f"recipe: {'both' if given else 'neither'} slices {'and' if given else 'nor'} models")
        settings = self._settings(document, "", shared=True)
        slices = (
            self._slices(document["slices"], base) if given == ["slices"] else (self._whole(document["models"], base),)
        )
        dtype, out_dtype = _dtype(document.get("dtype"), "dtype"), _dtype(document.get("out_dtype"), "out_dtype")
        return Stack(self._method, slices, base, dtype, out_dtype, settings, head, tuple(self._warnings))

    def _slices(self, value: object, base: ModelRef | None) -> tuple[OutputSlice, ...]:
        return tuple(
            self._slice(entry, f"slices[{i}]", base) for i, entry in enumerate(_list(value, "slices", "slices"))
        )

    def _slice(self, value: object, where: str, base: ModelRef | None) -> OutputSlice:
        entry = _mapping(value, where, ("sources", "base_model", "parameters"))
        own = None
        if entry.get("base_model") is not None:
            own = _model(entry["base_model"], f"{where}.base_model")
            if self._method != "task_arithmetic":
                raise UserError(f"{own.where}: has no meaning for {self._method}")
        place = f"{where}.sources"
        listed = _list(entry.get("sources"), place, "sources")
        sources = tuple(self._source(source, f"{place}[{i}]") for i, source in enumerate(listed))
        self._check_sources(sources, place, own or base)
        lengths = {source.stop - source.start for source in sources if source.stop is not None}
        if len(lengths) > 1:
            raise UserError(f"{place}: ranges of {' and '.join(map(str, sorted(lengths)))} layers cannot be merged")
        return OutputSlice(sources, own, self._settings(entry, f"{where}.", shared=True), where)

    def _source(self, value: object, where: str) -> SourceSlice:
        entry = _mapping(value, where, ("model", "layer_range", "parameters"))
        model = _model(entry.get("model"), f"{where}.model")
        place = f"{where}.layer_range"
        bounds = _list(entry.get("layer_range"), place, "[first, one after the last]")
        if len(bounds) != 2:
            raise UserError(f"{place}: {brief(bounds)} is not [first, one after the last]")
        start, stop = (_count(bound, f"{place}[{i}]") for i, bound in enumerate(bounds))
        if start > stop:
            raise UserError(f"{place}: [{start}, {stop}] runs backwards", hint=f"did you mean [{stop}, {start}]?")
        if start == stop:
            raise UserError(
                f"{place}: [{start}, {stop}] is empty", hint="the second number is one after the last layer"
            )
        return SourceSlice(model, start, stop, self._settings(entry, f"{where}.", shared=False), where)

    def _whole(self, value: object, base: ModelRef | None) -> OutputSlice:
        """The `models` form: all layers of each, the base added where it is not listed."""
        sources = []
        for i, item in enumerate(_list(value, "models", "models")):
            where = f"models[{i}]"
            entry = _mapping(item, where, ("model", "parameters"))
            model = _model(entry.get("model"), f"{where}.model")
            sources.append(SourceSlice(model, 0, None, self._settings(entry, f"{where}.", shared=False), where))
        if base and self._method != "passthrough" and base.name not in {source.model.name for source in sources}:
            sources.append(SourceSlice(base, 0, None, _NOTHING, base.where))
        self._check_sources(tuple(sources), "models", base)
        return OutputSlice(tuple(sources), None, _NOTHING, "models")

    def _check_sources(self, sources: tuple[SourceSlice, ...], where: str, base: ModelRef | None) -> None:
        names = [source.model.name for source in sources]
        if self._method == "passthrough":
            if len(names) != 1:
                raise UserError(f"{where}: passthrough takes one source, not {len(names)}", hint="or use linear")
            return
        for i, name in enumerate(names):
            if name in names[:i]:
                raise UserError(f"{sources[i].where}: {name} is there twice")
        if self._method == "task_arithmetic":
            if base is None:
                raise UserError("base_model: missing, and task_arithmetic needs one")
            if base.name not in names:
                raise UserError(f"{where}: the base model {base.name} is not among them")

    def _settings(self, entry: Mapping[str, Any], prefix: str, *, shared: bool) -> Settings:
        """The `parameters` of an entry. `shared`: whether those that are one for all inputs may stand here."""
        where = f"{prefix}parameters"
        value = entry.get("parameters")
        if value is None:
            return _NOTHING
        if type(value) is not dict:
            raise UserError(f"{where}: {brief(value)} is not a mapping")
        known = known_parameters(self._method)
        settings: dict[str, Any] = {}
        for name, setting in value.items():
            place = f"{where}.{name}"
            if name not in known:
                raise UserError(f"{place}: {self._method} has no parameter {brief(name)}", hint=_meant(name, known))
            if known[name].idle:
                self._warnings.append(f"{place}: has no effect in {self._method}")
            elif known[name].shared and not shared:
                raise UserError(f"{place}: is one for all inputs", hint="write it at the slice or at the top level")
            else:
                settings[name] = parse_setting(setting, place, known[name])
        return MappingProxyType(settings)


def _method(value: object) -> str:
    if isinstance(value, str) and value in METHODS:
        return value
    if isinstance(value, str) and value in _OTHER_METHODS:
        hint = f"it {_OTHER_METHODS[value]}; here: {', '.join(METHODS)}"
        raise UserError(f"merge_method: {value} cannot be calculated on read", hint=hint)
    raise UserError(f"merge_method: {brief(value)} is unknown", hint=_meant(value, METHODS))


def _dtype(value: object, where: str) -> str:
    if value is None:
        return ""
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    if name not in _DTYPES:
        raise UserError(f"{where}: {brief(value)} is not supported", hint=f"one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


# --- pieces ---------------------------------------------------------------------------------------------------------


def _model(value: object, where: str) -> ModelRef:
    name, revision = _name_and_revision(value, where)
    if not name or "\0" in name:
        raise UserError(f"{where}: {brief(value)} is not a model name")
    if "+" in name:
        raise UserError(f"{where}: {brief(name)} applies a LoRA, which is not supported")
    return ModelRef(f"{name}@{revision}" if revision else name, where)


def _name_and_revision(value: object, where: str) -> tuple[str, str]:
    """Spelt as text, or as mergekit writes it out: {model: {path, revision}}."""
    if isinstance(value, str):
        return value.strip(), ""
    if type(value) is not dict:
        raise UserError(f"{where}: {brief(value)} is not a model name" if value is not None else f"{where}: missing")
    if "model" in value:
        _refuse_unknown(value, ("model",), f"{where}.")
        return _name_and_revision(value["model"], f"{where}.model")
    _refuse_unknown(value, ("path", "revision"), f"{where}.")
    path, revision = value.get("path"), value.get("revision")
    if not isinstance(path, str) or not isinstance(revision, str | None):
        raise UserError(f"{where}: {brief(value)} is not a model name")
    return path.strip(), revision or ""


def _count(value: object, where: str) -> int:
    if type(value) is not int:
        raise UserError(f"{where}: {brief(value)} is not a whole number")
    if value < 0:
        raise UserError(f"{where}: {value} is negative", hint="layers count from 0; there is no counting from the end")
    if value > _LAYER_LIMIT:
        raise UserError(f"{where}: no model has layer {value}")
    return value


def _list(value: object, where: str, of: str) -> list[Any]:
    if type(value) is not list:
        raise UserError(f"{where}: missing" if value is None else f"{where}: {brief(value)} is not a list of {of}")
    if not value:
        raise UserError(f"{where} is empty")
    return value


def _mapping(value: object, where: str, keys: Collection[str]) -> dict[str, Any]:
    if type(value) is not dict:
        raise UserError(f"{where}: {brief(value)} is not a mapping")
    _refuse_unknown(value, keys, f"{where}.")
    return value


def _refuse_unknown(value: Mapping[str, Any], keys: Collection[str], prefix: str) -> None:
    for key in value:
        if key not in keys:
            raise UserError(f"{prefix}{key}: unknown key", hint=_meant(key, keys))


def _meant(value: object, known: Collection[str]) -> str:
    close = get_close_matches(str(value), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
