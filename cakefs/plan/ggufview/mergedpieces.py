"""The pieces of a SentencePiece model out of `tokenizer.json`, where there is no `tokenizer.model`. Pure.

SentencePiece joins the neighbours whose piece has the best score, a `tokenizer.json` those whose pair comes first in
its list. transformers makes the one of the other: pieces keep their ids, which rise as the score falls, and the list
has every pair that makes a piece. Where that is so, a score by the order of the ids joins the same, and is what
trainers write.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cakefs.formats.sentencepiece import Piece, PieceType
from cakefs.formats.strictjson import brief
from cakefs.plan.ggufview.refusal import NoGguf

_SPACE = "\u2581"  # SentencePiece's mark of a space
_MAX_LENGTH = 512  # Letters of a piece, each of which may be where it is cut in two.
_MAX_LETTERS = 8_000_000  # Of all pieces; a vocabulary of 262,144 has 2 million.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_FOREIGN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_TO_MARK_IN_FRONT = {"type": "Prepend", "prepend": _SPACE}
_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` was made of a SentencePiece model."""
    return bool(tokenizer["model"].get("byte_fallback"))


def read_pieces(tokenizer: Mapping[str, Any]) -> list[Piece]:
    """By id. Raises NoGguf where llama.cpp would join other pieces than the tokenizer does."""
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or not is_sentencepiece(tokenizer) or any(map(model.get, _FOREIGN)):
        raise NoGguf("there is no tokenizer.model, and tokenizer.json is not SentencePiece's")
    ids: Mapping[str, int] = model["vocab"]
    texts = sorted(ids, key=ids.__getitem__)
    if any(ids[text] != number for number, text in enumerate(texts)):
        raise NoGguf("tokenizer.json does not count its tokens from 0 on")
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}  # cut out before anything is joined
    _check_merges(ids, model.get("merges") or [], added)
    pieces, score = list[Piece](), 0
    for text in texts:
        if _BYTE.fullmatch(text) or text in added:
            pieces.append(Piece(text.encode(), 0.0, PieceType.NORMAL if text in added else PieceType.BYTE))
        else:
            pieces.append(Piece(text.encode(), -float(score), PieceType.NORMAL))
            score += 1
    return pieces


def _check_merges(ids: Mapping[str, int], merges: list[Any], added: set[str]) -> None:
    pairs, last = set[tuple[str, str]](), -1
    for merge in merges:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        if first + second in added:
            continue
        number = ids[first + second]
        if number < last:
            raise NoGguf(f"tokenizer.json joins {brief(first + second)} behind a piece of a higher id")
        last = number
        pairs.add((first, second))
    joined = [text for text in ids if text not in added]
    if max(map(len, joined), default=0) > _MAX_LENGTH or sum(map(len, joined)) > _MAX_LETTERS:
        raise NoGguf("tokenizer.json has pieces of more letters than any vocabulary of today")
    if len(pairs) != sum(text[:i] in ids and text[i:] in ids for text in joined for i in range(1, len(text))):
        raise NoGguf("tokenizer.json does not join all that make a piece")


def puts_space_in_front(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a text is taken as if it began with a space. Raises NoGguf for a rule that SentencePiece has not."""
    parts = [*_parts(tokenizer.get("normalizer")), *_parts(tokenizer.get("pre_tokenizer"))]
    marks, in_front = _TO_MARK in parts, _TO_MARK_IN_FRONT in parts
    for part in parts:
        if part.get("type") == "Metaspace" and part.get("replacement") == _SPACE and part.get("split") is False:
            marks, in_front = True, in_front or part.get("prepend_scheme") != "never"
        elif part not in (_TO_MARK, _TO_MARK_IN_FRONT, _AT_SPACES):
            raise NoGguf(f"tokenizer.json changes or cuts text by {brief(part.get('type'))}, as SentencePiece does not")
    if not marks:
        raise NoGguf("tokenizer.json does not mark spaces as SentencePiece does")
    return in_front


def _parts(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if step and step.get("type") == "Sequence":
        for inner in step.get("normalizers") or step.get("pretokenizers") or []:
            yield from _parts(inner)
    elif step:
        yield step
