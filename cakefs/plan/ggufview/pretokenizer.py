"""How a tokenizer.json cuts text before merging -> llama.cpp's name for it. Pure.

The converter knows a tokenizer by a hash over the ids that it gives a test text, so it knows only vocabularies it has
seen. Here the rule itself is looked at, which holds for any vocabulary: the expressions are those that llama.cpp
implements under the name. Tokenizers that share a rule under several names get the first name of llama.cpp's branch.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cakefs.formats.strictjson import brief
from cakefs.plan.ggufview.refusal import NoGguf

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|\p{{N}}%s"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_LLAMA3 = _WORDS % "{1,3}"
_QWEN2 = _WORDS % ""
_TEKKEN = _CASED % ("", "", "")
_GPT4O = _CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?", "{1,3}")


class _Rule(NamedTuple):
    """Steps of cutting; whether a word that is in the vocabulary is taken as it is, without merging."""

    steps: tuple[str, ...]
    whole_words: bool


_BYTES, _BYTES_BY_RULE, _DIGITS = "bytes", "bytes by gpt2's rule", "digits"
_NAMES = {
    _Rule((_LLAMA3, _BYTES), True): "llama-bpe",
    _Rule((_LLAMA3, _BYTES), False): "dbrx",
    _Rule((_QWEN2, _BYTES), False): "qwen2",
    _Rule((_TEKKEN, _BYTES), True): "tekken",
    _Rule((_GPT4O, _BYTES), False): "gpt-4o",
    _Rule((_DIGITS, _BYTES_BY_RULE), False): "smollm",
    _Rule((_BYTES_BY_RULE,), False): "gpt-2",
}
_NORMALIZERS = (None, "NFC")  # llama.cpp applies neither; NFC changes only text that is not composed.


def pre_type(tokenizer: Mapping[str, Any]) -> str:
    """Raises NoGguf where no rule of llama.cpp is known to be the same."""
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or "vocab" not in model:
        raise NoGguf(f"tokenizer.json: a model of type {brief(model.get('type'))} is not known here")
    if model.get("byte_fallback"):
        raise NoGguf("tokenizer.json is SentencePiece's, and there is no tokenizer.model to take the scores from")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise NoGguf("tokenizer.json marks parts of words in a way that llama.cpp does not know")
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in _NORMALIZERS:
        raise NoGguf(f"tokenizer.json: a normalizer of type {brief(normalizer)} is not known here")
    steps = tuple(_steps(tokenizer.get("pre_tokenizer") or {}))
    name = _NAMES.get(_Rule(steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise NoGguf("tokenizer.json cuts text by a rule that is not known here as one of llama.cpp's")
    return name


def _steps(cutter: Mapping[str, Any]) -> Iterator[str]:
    kind = cutter.get("type")
    if kind == "Sequence":
        for inner in cutter.get("pretokenizers") or []:
            yield from _steps(inner)
    elif kind == "Split" and _covers(cutter):
        yield cutter["pattern"].get("Regex", "")
    elif kind == "ByteLevel" and not cutter.get("add_prefix_space"):
        yield _BYTES_BY_RULE if cutter.get("use_regex", True) else _BYTES
    elif kind == "Digits" and cutter.get("individual_digits"):
        yield _DIGITS
    else:
        yield f"unknown {kind}"


def _covers(split: Mapping[str, Any]) -> bool:
    """Matches become words. As these expressions match everything, removing what lies between removes nothing."""
    form = (split.get("behavior"), bool(split.get("invert")))
    return form in (("Isolated", False), ("Removed", True))
