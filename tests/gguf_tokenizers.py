"""Small tokenizers made by hand, byte-level BPE and SentencePiece, with their settings."""

import json
import struct
from typing import Any

Config = dict[str, Any]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = TEKKEN.replace("]+|[^", "]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^", 1).replace(
    r"]*|\p{N}|", r"]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BYTES_BY_RULE = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
MERGES = ["t h", "th e", "\u0120 the", "i n", "\u0120 a", "e r", "o n", "r e", "\u0120 t", "\u0120 f", "a n", "an d"]
QWEN_ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>")
LLAMA_ADDED = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<plain>")
BPE_SIZE = 256 + len(MERGES) + 4  # tokens
SPM_SIZE = 300


def split(pattern: str) -> Config:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def rule(*steps: Config) -> Config:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def template(bos: str, eos: str = "", between: str = "") -> Config:
    def one(token: str, kind: int = 0) -> Config:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    def text(name: str, kind: int = 0) -> Config:
        return {"Sequence": {"id": name, "type_id": kind}}

    single = [one(bos), text("A"), *([one(eos)] if eos else [])]
    pair = [one(bos), text("A"), one(between or bos, 1), text("B", 1), *([one(eos, 1)] if eos else [])]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}}


def byte_letters() -> dict[int, str]:
    """How byte-level vocabularies write bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def bpe(
    cutter: Config,
    added: tuple[str, ...] = QWEN_ADDED,
    *,
    whole: bool = False,
    nfc: bool = False,
    post: Config | None = None,
    pairs: bool = False,
) -> bytes:
    """tokenizer.json; the last of the added tokens is not special."""
    letters = byte_letters()
    vocab = {letters[byte]: i for i, byte in enumerate(sorted(letters, key=lambda b: letters[b]))}
    for merge in MERGES:
        vocab[merge.replace(" ", "")] = len(vocab)
    tokens = [
        {
            "id": len(vocab) + i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": text != added[-1],
        }
        for i, text in enumerate(added)
    ]
    special = {t["content"]: {"id": t["content"], "ids": [t["id"]], "tokens": [t["content"]]} for t in tokens}
    for processor in [post, *(post or {}).get("processors", [])]:
        if processor and "special_tokens" in processor:
            processor["special_tokens"] = special
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": whole,
        "vocab": vocab,
        "merges": [merge.split(" ") for merge in MERGES] if pairs else MERGES,
    }
    found = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": cutter,
        "post_processor": post or {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    return json.dumps(found, ensure_ascii=False).encode()


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _block(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _pieces(
    control: tuple[str, ...] = (), *, gemma: bool = False, more: int = 0
) -> tuple[list[tuple[str, float, int]], list[str]]:
    """Text, score and type of each piece of a SentencePiece model; the special ones among them."""
    heads = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    words = [w.replace(" ", "\u2581") for w in (" t", "he", " the", " a", "in", "er", "on", "re", "an", "and", " q")]
    words += [" ".replace(" ", "\u2581"), *"etaoinshrdlucmfwypvbgkjqxz", ".", ",", "\u00e9", "\u4f60"]
    pieces = [(text, 0.0, 2 if text == "<unk>" else 3) for text in [*heads, *control]]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(word, -float(i), 1) for i, word in enumerate(words[: SPM_SIZE - len(pieces) - 3 + more])]
    return pieces, [*heads, *control]


def sentencepiece_json(*, control: tuple[str, ...] = (), gemma: bool = False) -> bytes:
    """The tokenizer.json that transformers makes of such a tokenizer.model."""
    pieces, special = _pieces(control, gemma=gemma)
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    halves = [(text[:i], text[i:]) for text in vocab if text not in special for i in range(1, len(text))]
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    to_space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = [] if gemma else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start = "<bos>" if gemma else "<s>"
    post = template(start)
    post["special_tokens"] = {start: {"id": start, "ids": [vocab[start]], "tokens": [start]}}
    found = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[text], "content": text, **flags} for text in special],
        "normalizer": to_mark if gemma else None,
        "pre_tokenizer": at_spaces if gemma else metaspace,
        "post_processor": post,
        "decoder": {"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in halves if pair[0] in vocab and pair[1] in vocab],
        },
    }
    return json.dumps(found, ensure_ascii=False).encode()


def sentencepiece(
    *, control: tuple[str, ...] = (), algorithm: int = 2, gemma: bool = False, table: bytes = b"", more: int = 0
) -> bytes:
    """tokenizer.model: the bytes and some words."""
    pieces, heads = _pieces(control, gemma=gemma, more=more)
    unk, bos, eos = (heads.index(name) for name in (("<unk>", "<bos>", "<eos>") if gemma else ("<unk>", "<s>", "</s>")))
    data = b"".join(
        _block(1, _block(1, text.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _number(3, kind))
        for text, score, kind in pieces
    )
    data += _block(
        2,
        _number(3, algorithm)
        + _number(4, len(pieces))
        + _number(35, 1)
        + _number(40, unk)
        + _number(41, bos)
        + _number(42, eos),
    )
    normal = _block(1, b"identity") + (_block(2, table) if table else b"")
    return data + _block(3, normal + _number(3, int(not gemma)) + _number(4, 0) + _number(5, 1))


def _decoder(*texts: str, start: int = 0) -> Config:
    return {
        str(start + i): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, text in enumerate(texts)
    }


QWEN_SETTINGS: Config = {
    "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
    "unk_token": None, "add_prefix_space": False, "add_bos_token": False, "errors": "replace",
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
}  # fmt: skip
LLAMA_SETTINGS: Config = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
    "chat_template": "{{ messages[0]['content'] }}",
}  # fmt: skip
SPM_SETTINGS: Config = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "add_bos_token": True, "add_eos_token": False, "legacy": False,
    "added_tokens_decoder": _decoder("<unk>", "<s>", "</s>"),
}  # fmt: skip
GEMMA_SETTINGS: Config = {
    "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
    "pad_token": "<pad>", "add_bos_token": True, "add_eos_token": False,
    "added_tokens_decoder": _decoder("<pad>", "<eos>", "<bos>", "<unk>"),
}  # fmt: skip
