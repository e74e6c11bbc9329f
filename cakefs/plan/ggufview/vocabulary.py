"""Tokens of a model as the header of a GGUF lists them: from `tokenizer.model` or from `tokenizer.json`. Pure.

A vocabulary of SentencePiece's that is there as `tokenizer.json` only, as transformers 5 saves it, is written as its
`tokenizer.model` would be. There the converter stops, or gives all pieces one score, by which llama.cpp joins others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cakefs.formats.gguf import Kind
from cakefs.formats.ggufwrite import encode, encode_array
from cakefs.formats.sentencepiece import Algorithm, Piece, parse_model
from cakefs.formats.sentencepiece import PieceType as TokenType  # llama.cpp has taken them over, numbers and all
from cakefs.formats.strictjson import brief
from cakefs.plan.ggufview.archs import Arch
from cakefs.plan.ggufview.archs import Vocabulary as Wanted
from cakefs.plan.ggufview.mergedpieces import is_sentencepiece, puts_space_in_front, read_pieces
from cakefs.plan.ggufview.pretokenizer import pre_type
from cakefs.plan.ggufview.refusal import NoGguf
from cakefs.plan.ggufview.sidefiles import SideFiles
from cakefs.plan.ggufview.special import Fields, special_fields, special_id

SENTENCEPIECE, BPE, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_ADD_SPACE = "tokenizer.ggml.add_space_prefix"
_SPACE = "\u2581"  # SentencePiece's mark of a space
_SPECIAL_LOOKS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_MARKS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))  # the second of full width
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ABSENT_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_CODELLAMA, _SMALL_GRANITE = 32016, 49152  # Sizes of vocabulary by which the converter knows these.


class Vocabulary(NamedTuple):
    """Keys of the header, and how many tokens they list."""

    fields: Fields
    tokens: int


def read_vocabulary(files: SideFiles, arch: Arch, size: int) -> Vocabulary:
    """Raises NoGguf for a tokenizer that llama.cpp, or cakefs, cannot reproduce.

    Args:
        size: Tokens by config.json; those that the files lack are filled up.
    """
    settings = files.json(SETTINGS) or {}
    fields: Fields = {}
    llama, gemma, bare = arch.name == "llama", arch.name.startswith("gemma"), False
    prefix = settings.get("add_prefix_space")
    if llama and prefix is not None:
        fields[_ADD_SPACE] = encode(Kind.BOOL, bool(prefix))
    if _takes_sentencepiece(files, arch, settings):
        fields |= _sentencepiece(files, arch, size)
        bare = SENTENCEPIECE not in files and not _has_space_in_front(files, gemma=gemma)
    else:
        fields |= _bpe(files, settings, size)
    if llama and size == _CODELLAMA:
        fields["tokenizer.ggml.eot_token_id"] = encode(Kind.U32, special_id(files, "eot", 32010))
    if llama and size == _SMALL_GRANITE:
        fields["tokenizer.ggml.add_bos_token"] = encode(Kind.BOOL, False)
    if gemma or bare:
        fields[_ADD_SPACE] = encode(Kind.BOOL, False)
    return Vocabulary(fields, size)


def wanted_files(arch: Arch, paths: Sequence[str]) -> list[str]:
    """Those that the vocabulary is read from, which may be larger than what every `add` brings."""
    by_kind = {
        Wanted.SENTENCEPIECE: (SENTENCEPIECE, BPE),
        Wanted.BPE: (BPE,),
        Wanted.EITHER: (SENTENCEPIECE, BPE),
        Wanted.PHI3: (SENTENCEPIECE, BPE),
    }
    return [path for path in by_kind[arch.vocabulary] if path in paths]


def check_tokenizer(files: SideFiles, arch: Arch) -> None:
    """To be asked first, as it costs nothing. Raises NoGguf where no file has a vocabulary."""
    if not any(path in files for path in (SENTENCEPIECE, BPE)):
        _takes_sentencepiece(files, arch, files.json(SETTINGS) or {})  # says which is looked for


def _takes_sentencepiece(files: SideFiles, arch: Arch, settings: Mapping[str, Any]) -> bool:
    wanted = arch.vocabulary
    if wanted is Wanted.PHI3:
        wanted = Wanted.BPE if settings.get("tokenizer_class") == "GPT2Tokenizer" else Wanted.SENTENCEPIECE
    if SENTENCEPIECE in files and wanted is not Wanted.BPE:
        return True
    if BPE not in files:
        path = SENTENCEPIECE if wanted is Wanted.SENTENCEPIECE else BPE
        raise NoGguf(f"there is no {path}, which the vocabulary is read from")
    return wanted is Wanted.SENTENCEPIECE or (wanted is Wanted.EITHER and is_sentencepiece(files.json(BPE) or {}))


def _has_space_in_front(files: SideFiles, *, gemma: bool) -> bool:
    found = puts_space_in_front(files.json(BPE) or {})
    if found and gemma:
        raise NoGguf(f"{BPE} puts a space in front of a text, which llama.cpp does not do for gemma")
    return found


def _lists(
    model: str, pre: str, tokens: Sequence[bytes | str], types: Sequence[int], scores: Sequence[float]
) -> Fields:
    scored = {"tokenizer.ggml.scores": encode_array(Kind.F32, scores)} if scores else {}
    return {
        "tokenizer.ggml.model": encode(Kind.STRING, model),
        "tokenizer.ggml.pre": encode(Kind.STRING, pre),
        "tokenizer.ggml.tokens": encode_array(Kind.STRING, tokens),
        **scored,
        "tokenizer.ggml.token_type": encode_array(Kind.I32, types),
    }


def looks_special(token: str) -> bool:
    """Tokens that some models forget to mark as special."""
    marked = any(token.startswith(start) and token.endswith(end) for start, end in _MARKS)
    return marked or token in _SPECIAL_LOOKS


# --- SentencePiece --------------------------------------------------------------------------------------------------


def _sentencepiece(files: SideFiles, arch: Arch, size: int) -> Fields:
    kept = _pieces(files, arch)[:size]
    taken = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.UNUSED, TokenType.BYTE)
    absent = range(len(kept), size)
    tokens = [piece.text for piece in kept] + [b"[PAD%d]" % i for i in absent]
    scores = [piece.score for piece in kept] + [_ABSENT_SCORE] * len(absent)
    listed = [int(piece.type if piece.type in taken else TokenType.NORMAL) for piece in kept]
    listed += [int(TokenType.UNUSED)] * len(absent)
    for number, (text, kind) in _added_pieces(files, arch).items():
        if number < 0:
            raise NoGguf(f"token {brief(text)} has the id {number}")
        if number < size:
            tokens[number], scores[number], listed[number] = text.encode(), _ADDED_SCORE, int(kind)
    return {**_lists("llama", "default", tokens, listed, scores), **special_fields(files, size)}


def _pieces(files: SideFiles, arch: Arch) -> list[Piece]:
    if SENTENCEPIECE not in files:
        return read_pieces(files.json(BPE) or {})
    model = parse_model(files.data(SENTENCEPIECE) or b"", SENTENCEPIECE)
    if model.algorithm is not Algorithm.BPE:
        raise NoGguf(f"{SENTENCEPIECE} is of the {model.algorithm.name} kind, which llama.cpp has not for {arch.name}")
    if not model.verbatim:
        raise NoGguf(f"{SENTENCEPIECE} changes text before it cuts it, which llama.cpp does not do for {arch.name}")
    return model.pieces


def _added_pieces(files: SideFiles, arch: Arch) -> dict[int, tuple[str, TokenType]]:
    """What the files beside it add to a SentencePiece model, or say otherwise of it."""
    found: dict[int, tuple[str, TokenType]] = {}
    for text, number in (files.json("added_tokens.json") or {}).items():
        found[int(number)] = (text, TokenType.USER_DEFINED)
    stated = (files.json(BPE) or {}).get("added_tokens") or []
    decoder = {token["id"]: token for token in stated} if SENTENCEPIECE not in files else {}
    decoder |= {int(i): token for i, token in ((files.json(SETTINGS) or {}).get("added_tokens_decoder") or {}).items()}
    for number, token in decoder.items():
        text = token["content"]
        if arch.name == "phi3":
            kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        elif token.get("special") or looks_special(text):
            kind = TokenType.CONTROL
        else:
            text, kind = text.replace(_SPACE, " "), TokenType.USER_DEFINED
        found[number] = (text, kind)
    if arch.name == "phi3":
        for token in stated:
            kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
            found[int(token["id"])] = (token["content"], kind)
    return found


# --- byte-level BPE -------------------------------------------------------------------------------------------------


def _bpe(files: SideFiles, settings: Mapping[str, Any], size: int) -> Fields:
    tokenizer = files.json(BPE) or {}
    pre = pre_type(tokenizer)
    model = tokenizer["model"]
    ids: dict[str, int] = dict(model["vocab"])
    if "added_tokens_decoder" not in settings:  # from before that had the tokens themselves
        settings = {**settings, **(files.json("special_tokens_map.json") or {})}
    added = _added_tokens(tokenizer, settings, ids)
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, number in ids.items():
        if not 0 <= number < size:
            raise NoGguf(f"token {brief(text)} has the id {number}, config.json counts {size}")
        tokens[number], types[number] = text, int(TokenType.NORMAL)
    for number, token in added.items():
        text = token["content"]
        if not 0 <= number < size:
            raise NoGguf(f"token {brief(text)} has the id {number}, config.json counts {size}")
        special = token.get("special") or looks_special(text)
        tokens[number] = text if special else text.replace(_SPACE, " ")
        types[number] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    merges = _merges(model.get("merges") or [])
    listed = {"tokenizer.ggml.merges": encode_array(Kind.STRING, merges)} if merges else {}
    return {**_lists("gpt2", pre, tokens, types, ()), **listed, **special_fields(files)}


def _added_tokens(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], ids: Mapping[str, int]
) -> dict[int, Mapping[str, Any]]:
    """By id; those that both files speak of must agree. What is named, as the end of a text say, is special."""
    added = {token["id"]: token for token in tokenizer.get("added_tokens") or []}
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        text, number = token["content"], int(number)
        if (added[number]["content"] if number in added else text) != text or ids.get(text, number) != number:
            raise NoGguf(f"{BPE} and {SETTINGS} do not agree about token {number}")
        added[number] = token
    numbers = {token["content"]: number for number, token in added.items()}
    for name in _NAMED:
        entry = settings.get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            number = numbers.get(text, ids.get(text))
            if number is None:
                raise NoGguf(f"{SETTINGS} names a {name} that {BPE} lacks")
            added[number] = {"normalized": False, **added.get(number, {"content": text}), "special": True}
    for token in added.values():
        # The converter takes such a token through the byte-level decoder, which reads these letters as bytes.
        if not token.get("normalized", not token.get("special")) and any(
            "\xa0" < c < "\u0144" for c in token["content"]
        ):
            raise NoGguf(f"added token {brief(token['content'])} has letters that stand for bytes")
    return added


def _merges(merges: Sequence[Any]) -> list[str]:
    """Pairs with a space between; one within a part is written as byte-level vocabularies write it."""
    if isinstance(merges, list) and merges and isinstance(merges[0], str):
        return merges
    return [f"{a} {b}" if " " not in a and " " not in b else f"{_marked(a)} {_marked(b)}" for a, b in merges]


def _marked(part: str) -> str:
    return part.replace(" ", chr(ord(" ") + 256))
