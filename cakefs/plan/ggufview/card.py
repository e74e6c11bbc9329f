"""`general.*` of a GGUF header: name, origin, size and licence, as llama.cpp's converter finds them. Pure.

It looks into the model card, then at `_name_or_path` in config.json, then at the name of the directory, and takes a
name apart by the habits of the Hub: `Llama-3.1-8B-Instruct` is basename, version, size label and finetune.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cakefs.formats.frontmatter import parse_front_matter
from cakefs.formats.gguf import Kind
from cakefs.formats.ggufwrite import encode, encode_array
from cakefs.plan.ggufview.sidefiles import SideFiles

Fields = dict[str, bytes]
Facts = dict[str, Any]

_SAMPLING = (
    ("sequence", Kind.STRING, ("sequence",)),
    ("top_k", Kind.I32, ("top_k",)),
    ("top_p", Kind.F32, ("top_p",)),
    ("min_p", Kind.F32, ("min_p",)),
    ("xtc_probability", Kind.F32, ("xtc_probability",)),
    ("xtc_threshold", Kind.F32, ("xtc_threshold",)),
    ("temp", Kind.F32, ("temperature",)),
    ("penalty_last_n", Kind.I32, ("penalty_last_n",)),
    ("penalty_repeat", Kind.F32, ("penalty_repeat", "repetition_penalty")),
    ("mirostat", Kind.I32, ("mirostat",)),
    ("mirostat_tau", Kind.F32, ("mirostat_tau",)),
    ("mirostat_eta", Kind.F32, ("mirostat_eta",)),
)
# Facts of the header in its order, and where a card states them; the first that is there counts.
_CARD = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "description": ("description", "model_description"),
    "size_label": ("size_label", "model_size_label"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
    "source.url": ("url", "model_url"),
    "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"),
}
_PARENTS = ("base_model", "base_models", "base_model_sources")
_DATASETS = ("datasets", "dataset", "dataset_sources")
_ENTRY = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_TYPE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_TUNED = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_KEEPS_CASE = re.compile(r"v\d+(?:\.\d+)*|\d.*")
_HUB_PAGE = re.compile(r"https?://huggingface.co/([^/]+/[^/]+)$")


class Sizes(NamedTuple):
    """Elements of all tensors, of those outside experts, and of one expert of each layer; experts of a layer."""

    total: int
    shared: int
    expert: int
    experts: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> "Sizes":
        """From names and shapes of the GGUF's tensors."""
        total = shared = expert = stacks = counted = 0
        for name, shape in tensors:
            size = 1
            for dim in shape:
                size *= dim
            total += size
            if "_exps." in name and len(shape) >= 3:
                expert += size // shape[-3]
                counted += shape[-3]
                stacks += 1
            else:
                shared += size
        return cls(total, shared, expert, counted // stacks if stacks else 0)

    def label(self) -> str:
        if self.experts:
            return f"{self.experts}x{_rounded(self.shared + self.expert)}"
        return _rounded(self.total)


class Name(NamedTuple):
    """A model's name taken apart."""

    full: str | None = None
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


def general_fields(files: SideFiles, directory: str, sizes: Sizes) -> Fields:
    """Sampling first, then what the model is.

    Args:
        directory: Name of the model's directory, which counts where nothing else names it.
    """
    card = parse_front_matter(files.text("README.md") or "")
    facts: Facts = {fact: _stated(card, fact, keys) for fact, keys in _CARD.items()}
    parents = _entries(card, _PARENTS, sizes.total)
    datasets = _entries(card, _DATASETS, sizes.total)
    named = (files.json("config.json") or {}).get("_name_or_path")
    if isinstance(named, str) and named.count("/") <= 1:
        _fill(facts, take_apart(named, sizes.total))
    _fill(facts, take_apart(directory, sizes.total))
    facts["name"] = facts["name"] if facts["name"] is not None else directory
    if facts["size_label"] is None and sizes.total:
        facts["size_label"] = sizes.label()
    if isinstance(facts["license"], list):
        facts["license"] = ",".join(facts["license"])
    fields = _sampling(files)
    fields |= {f"general.{fact}": _text(value) for fact, value in facts.items() if value not in (None, "")}
    fields |= _listed("base_model", parents)
    fields |= _listed("dataset", datasets)
    for fact, keys in (("tags", ("tags", "pipeline_tag")), ("languages", ("languages", "language"))):
        values = [value for key in keys for value in _as_list(card.get(key)) if isinstance(value, str | int | float)]
        if values:
            fields[f"general.{fact}"] = encode_array(Kind.STRING, [_word(value) for value in values])
    return fields


def _sampling(files: SideFiles) -> Fields:
    settings = files.json("generation_config.json") or {}
    found: Fields = {}
    for name, kind, keys in _SAMPLING:
        value = _first(settings, keys)
        if value is not None:
            found[f"general.sampling.{name}"] = encode(kind, value)
    return found


def _first(found: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((found[key] for key in keys if found.get(key) is not None), None)


def _stated(card: Mapping[str, Any], fact: str, keys: tuple[str, ...]) -> Any:
    """A text or number; of licences also a list."""
    value = _first(card, keys)
    if fact == "license" and isinstance(value, list):
        return [item for item in value if isinstance(item, str)]
    return value if isinstance(value, str | int | float) else None


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def _text(value: object) -> bytes:
    return encode(Kind.STRING, _word(value))


def _word(value: object) -> str:
    return value if isinstance(value, str) else str(value)


def _fill(facts: Facts, name: Name) -> None:
    found = name._replace(
        full=None if name.full is None else titled(name.full),
        organization=None if name.organization is None else titled(name.organization),
    )
    for fact, value in zip(("name", *Name._fields[1:]), found, strict=True):
        if facts[fact] is None:
            facts[fact] = value


# --- parents and datasets -------------------------------------------------------------------------------------------


def _entries(card: Mapping[str, Any], keys: tuple[str, ...], total: int) -> list[Mapping[str, Any]] | None:
    """None where the card does not speak of them."""
    if not any(key in card for key in keys):
        return None
    value = next(card[key] for key in keys if key in card)
    return [item if isinstance(item, dict) else _entry(item, total) for item in _as_list(value)]


def _entry(item: object, total: int) -> Mapping[str, Any]:
    if not isinstance(item, str):
        return {}
    page = item.startswith(("http://", "https://", "ssh://"))
    on_hub = _HUB_PAGE.match(item)
    found: Facts = {"repo_url": item} if page else {}
    name = take_apart(on_hub[1] if on_hub else item, total) if on_hub or not page else Name()
    if name.full is not None:
        found["name"] = titled(name.full)
    if name.organization is not None:
        found["organization"] = titled(name.organization)
    if name.version is not None:
        found["version"] = name.version
    if not page and name.organization is not None and name.full is not None:
        found["repo_url"] = f"https://huggingface.co/{name.organization}/{name.full}"
    return found


def _listed(kind: str, entries: list[Mapping[str, Any]] | None) -> Fields:
    if entries is None:
        return {}
    found = {f"general.{kind}.count": encode(Kind.U32, len(entries))}
    for number, entry in enumerate(entries):
        found |= {
            f"general.{kind}.{number}.{fact}": _text(value)
            for fact in _ENTRY
            if isinstance(value := entry.get(fact), str) and value
        }
    return found


# --- names ----------------------------------------------------------------------------------------------------------


def titled(text: str) -> str:
    words = text.strip().replace("-", " ").split()
    return " ".join(w.title() if w.islower() and not _KEEPS_CASE.fullmatch(w) else w for w in words)


def take_apart(model_id: str, total: int) -> Name:
    """`org/name-8B-instruct-v0.1` by its parts.

    Args:
        total: Elements of the model's tensors: what looks like a size but is far from it is a context length.
    """
    if " " in model_id:
        return Name(model_id)
    organization, slash, full = model_id.partition("/")
    if not slash:
        organization, full = "", model_id
    parts = [part for part in full.split("-") if part]
    kinds: list[set[str]] = []
    for i, part in enumerate(parts):
        parts[i], kind = _kind(part, i, total)
        kinds.append({kind} if kind else set())
    _drop_worded_sizes(parts, kinds)
    _mark_base(parts, kinds)

    def joined(kind: str, *, unless: str = "") -> str | None:
        return "-".join(p for p, k in zip(parts, kinds, strict=True) if kind in k and unless not in k) or None

    sizes = dict.fromkeys(p for p, k in zip(parts, kinds, strict=True) if "size" in k)
    label, finetune, version = "-".join(sizes) or None, joined("finetune"), joined("version", unless="base")
    base = joined("base") if label or finetune or version else None
    organized = organization if slash and not organization.startswith(".") else None
    return Name(full, organized, base, finetune, version, label)


def _kind(part: str, place: int, total: int) -> tuple[str, str]:
    """The part as it is written from now on, and what it is; empty where it could be anything."""
    if _VERSION.fullmatch(part):
        return part, "version"
    if _TYPE.fullmatch(part):
        return part.upper(), "type"
    if place and _SIZE.fullmatch(part):
        return _size(part.replace("_", "."), total)
    return part, "finetune" if place and _TUNED.fullmatch(part) else ""


def _size(part: str, total: int) -> tuple[str, str]:
    if part[-1].isdecimal():  # 7b1
        part = f"{part[:-2]}.{part[-1]}{part[-2]}"
    if len(part) > 1 and part[-2].isdecimal() and part[-1] in "kmbt":
        part = part[:-1] + part[-1].upper()
    if total:
        try:
            stated = float(part[:-1]) * pow(1000, " KMBT".find(part[-1]))
        except ValueError:
            return part, "size"
        if abs(stated - total) > 7 * total // 8:
            return part[:-1] + part[-1].lower(), "finetune"
    return part, "size"


def _drop_worded_sizes(parts: list[str], kinds: list[set[str]]) -> None:
    """`small` is no size where another part says it in numbers."""
    sizes = [part for part, kind in zip(parts, kinds, strict=True) if "size" in kind]
    if any(letter.isdecimal() for part in sizes for letter in part):
        for part, kind in zip(parts, kinds, strict=True):
            if all(letter.isalpha() for letter in part):
                kind.discard("size")


def _mark_base(parts: list[str], kinds: list[set[str]]) -> None:
    """The base name is what comes first; a version at its end is a version only."""
    at_start = True
    for part, kind in zip(parts, kinds, strict=True):
        if at_start and ((not kind and part[0].isalpha()) or "version" in kind):
            kind.add("base")
            continue
        at_start = False
        if not kind:
            kind.add("finetune")
    for kind in reversed(kinds):
        if "base" not in kind or len(kind) == 1:
            break
        kind.remove("base")


def _rounded(count: int) -> str:
    """As short as two digits allow: 7.6B, 494M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count > size:
            return _scaled(count * {"T": 1e-12, "B": 1e-9, "M": 1e-6}[letter], letter)
    return _scaled(count * 1e-3, "K")


def _scaled(number: float, letter: str) -> str:
    digits = max(2 - len(str(round(number)).lstrip("0")), 0)
    return f"{number:.{digits}f}{letter}"
