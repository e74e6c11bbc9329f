"""Special tokens, what is added around a text, and chat templates, as the header of a GGUF states them. Pure.

Their ids come from tokenizer_config.json by way of the added tokens of tokenizer.json, then from config.json; whether
they are put around a text, from the post-processor, then from tokenizer_config.json.
"""

import string
from collections.abc import Mapping, Sequence
from typing import Any

from cakefs.formats.gguf import Kind
from cakefs.formats.ggufwrite import encode, encode_array
from cakefs.formats.strictjson import brief
from cakefs.plan.ggufview.refusal import NoGguf
from cakefs.plan.ggufview.sidefiles import SideFiles

Fields = dict[str, bytes]

_TYPES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ID_KEYS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask", "eot": "eot",
    "eom": "eom",
}  # fmt: skip
_ADD_KEYS = ("bos", "eos", "sep")
_TEMPLATE = "tokenizer.chat_template"
_MAX_ID = 2**32  # A negative id, as some config.json have it for padding, stands for none.
_NAME_LETTERS = string.ascii_letters + string.digits


def special_fields(files: SideFiles, limit: int | None = None) -> Fields:
    """The keys behind a vocabulary.

    Args:
        limit: Ids from here on are left out.
    """
    return _Specials(files, _TYPES, limit).fields()


def special_id(files: SideFiles, kind: str, default: int) -> int:
    """The id of a type that not every model has."""
    return _Specials(files, (kind,), None).ids.get(kind, default)


class _Specials:
    """Attributes: ids: By type."""

    def __init__(self, files: SideFiles, types: tuple[str, ...], limit: int | None) -> None:
        self._types, self._limit = types, limit
        self.ids: dict[str, int] = {}
        self._adds: dict[str, bool] = {}
        self._normalizer: Fields = {}
        self._template: Any = None
        tokenizer = files.json("tokenizer.json")
        self._settings: dict[str, Any] = dict(files.json("tokenizer_config.json") or {})
        if tokenizer is not None:
            self._normalize(tokenizer.get("normalizer") or {})
            self._process(tokenizer.get("post_processor") or {})
        if self._settings:
            self._template = self._settings.get("chat_template", _template_beside(files))
            self._named((tokenizer or {}).get("added_tokens") or [])
        config = files.json("config.json") or {}
        for kind in self._types:
            self._set(kind, config.get(f"{kind}_token_id"))

    def fields(self) -> Fields:
        found: Fields = {}
        for kind, number in self.ids.items():
            if kind in _ID_KEYS:
                found[f"tokenizer.ggml.{_ID_KEYS[kind]}_token_id"] = encode(Kind.U32, number)
        for kind, value in self._adds.items():
            if kind in _ADD_KEYS:
                found[f"tokenizer.ggml.add_{kind}_token"] = encode(Kind.BOOL, value)
        return {**found, **_templates(self._template), **self._normalizer}

    def _set(self, kind: str, number: object) -> None:
        if type(number) is int and kind not in self.ids and 0 <= number < (self._limit or _MAX_ID):
            self.ids[kind] = number

    def _named(self, added: Sequence[Mapping[str, Any]]) -> None:
        """Tokens that tokenizer_config.json gives by their text."""
        ids: dict[object, object] = {}
        for token in added:
            ids.setdefault(token.get("content"), token.get("id"))
        for kind in self._types:
            flag = self._settings.get(f"add_{kind}_token")
            if isinstance(flag, bool):
                self._adds.setdefault(kind, flag)
            text = _content(self._settings.get(f"{kind}_token"))
            if text is not None:
                self._set(kind, ids.get(text))

    # -- what surrounds a text ---------------------------------------------------------------------------------------

    def _process(self, post: Mapping[str, Any]) -> None:
        settings = self._settings
        if settings:
            for first, second in (("bos_token", "cls_token"), ("eos_token", "sep_token")):
                if not settings.get(first) and settings.get(second):
                    settings[first] = settings[second]
        for processor in post.get("processors", [post] if post else []):
            kind = processor.get("type")
            if kind == "ByteLevel":
                self._adds.setdefault("bos", False)
                self._adds.setdefault("eos", False)
            elif kind == "TemplateProcessing":
                self._apply_template(processor)
            elif kind not in ("Sequence", None):
                raise NoGguf(f"tokenizer.json: a post-processor of type {brief(kind)} is not known here")

    def _apply_template(self, processor: Mapping[str, Any]) -> None:
        single, pair = processor.get("single") or [], processor.get("pair") or []
        bos, eos, cls, sep = (self._settings.get(f"{kind}_token") for kind in ("bos", "eos", "cls", "sep"))
        first = _special(single[0]) if len(single) > 1 else None
        last = _special(single[-1]) if len(single) > 1 else None
        if first:
            if not self._settings:
                bos = first
            elif first not in (bos, cls):
                if not bos:
                    self._settings["bos_token"] = bos = first
                if not cls:
                    self._settings["cls_token"] = cls = first
            self._adds["bos"] = first in (bos, cls)
        if last:
            eos = self._end(eos, last)
            self._adds["eos"] = True
        self._separate(pair, first, last, sep, eos)

    def _end(self, eos: object, last: str) -> str:
        """The template ends a text with another token than the end of sequence: that one ends a turn."""
        if self._settings and last != eos:
            turn = "eot" if "eot" not in self._types else "eom"
            if turn not in self._types:
                self._types = (*self._types, turn)
                self._settings[f"{turn}_token"] = eos
            self._settings["eos_token"] = last
        return last

    def _separate(self, pair: list[Any], first: str | None, last: str | None, sep: object, eos: object) -> None:
        if not pair:
            return
        start = 1 if first and _special(pair[0]) == first else 0
        stop = len(pair) - (1 if last and _special(pair[-1]) == last else 0)
        inner = pair[start:stop]
        if not inner or _sequence(inner[0]) != "A" or _sequence(inner[-1]) != "B" or len(inner) < 3:
            return
        between = [_special(item) for item in inner[1:-1]]
        known = [bool(token) and token in (sep, eos) for token in between]
        add = (known[0] and not last) or (len(between) == 2 and known[1])
        self._adds["sep"] = add
        if add and not sep and self._settings:
            self._settings["sep_token"] = eos

    def _normalize(self, normalizer: Mapping[str, Any]) -> None:
        kind = normalizer.get("type")
        if kind == "Sequence":
            for inner in normalizer.get("normalizers") or []:
                self._normalize(inner)
        elif kind == "Lowercase":
            self._normalizer["tokenizer.ggml.normalizer.lowercase"] = encode(Kind.BOOL, True)
        elif kind == "StripAccents":
            self._normalizer["tokenizer.ggml.normalizer.strip_accents"] = encode(Kind.BOOL, True)


def _content(entry: object) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _special(item: Mapping[str, Any]) -> str | None:
    found = item.get("SpecialToken", {}).get("id")
    return found if isinstance(found, str) else None


def _sequence(item: Mapping[str, Any]) -> object:
    return item.get("Sequence", {}).get("id")


# --- chat templates -------------------------------------------------------------------------------------------------


def _template_beside(files: SideFiles) -> Any:
    """The template in a file of its own; several where there are more in a directory."""
    single = files.text("chat_template.jinja")
    if single is None:
        return (files.json("chat_template.json") or {}).get("chat_template")
    named = files.under("additional_chat_templates/", ".jinja")
    if not named:
        return single
    listed = [{"name": "default", "template": single}]
    return listed + [{"name": name, "template": files.text(path)} for name, path in sorted(named.items())]


def _templates(template: Any) -> Fields:
    if isinstance(template, str):
        return {_TEMPLATE: encode(Kind.STRING, template)} if template else {}
    if not isinstance(template, list):
        return {}
    found: Fields = {}
    default, names = None, []
    for choice in template:
        name = "".join(letter if letter in _NAME_LETTERS else "_" for letter in choice.get("name", ""))
        text = choice.get("template")
        if not name or text is None:
            continue
        if name == "default":
            default = text
        else:
            names.append(name)
            found |= {f"{_TEMPLATE}.{name}": encode(Kind.STRING, text)} if text else {}
    if names:
        found["tokenizer.chat_templates"] = encode_array(Kind.STRING, sorted(set(names)))
    return {**found, _TEMPLATE: encode(Kind.STRING, default)} if default else found
