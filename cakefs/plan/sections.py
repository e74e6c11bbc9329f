"""Where a config.json counts its layers: under which key, at the top or in a config nested in it. Pure."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from cakefs.errors import InvalidFormat

Config = dict[str, Any]

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "layers", "num_blocks")
_ENCODER = ("encoder_layers", "num_encoder_layers")
_DECODER = ("decoder_layers", "num_decoder_layers")
BEYOND = ("num_nextn_predict_layers", "num_mtp_layers")
TEXT_CONFIGS = (
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "language_model_config",
    "decoder_config",
)
_COUNTED = ("layers_block_type", "layer_types")  # nemotron_h has no count beside them
_VISION = re.compile(r"vis|image|vit\b|siglip|clip", re.IGNORECASE)
_AUDIO = re.compile(r"audio|speech|whisper", re.IGNORECASE)


class Section(NamedTuple):
    """Where a config counts a stack of layers.

    Attributes:
        path: Keys from the top to the nested config that holds the counts.
        keys: Those that hold the count; none where a list with one entry a layer is all there is.
        layers: How many.
        beyond: Heads for further tokens (MTP): named as layers after the last one, or apart from them.
    """

    path: tuple[str, ...]
    keys: tuple[str, ...]
    layers: int
    beyond: int


def parse_config(data: bytes, path: str) -> Config:
    """Raises InvalidFormat. Infinity and NaN are let through: transformers writes them."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidFormat(f"{path} is not JSON: {error}") from error
    if type(config) is not dict:
        raise InvalidFormat(f"{path} is not a JSON object")
    return config


def encode_config(config: Config) -> bytes:
    """As transformers writes it."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def find_section(config: Config, prefix: str = "") -> Section | None:
    """The counts of the layers under a prefix that is known, else of the main stack; None where there are none."""
    sections = list(nested_configs(config, ()))
    kind = _VISION if _VISION.search(prefix) else _AUDIO if _AUDIO.search(prefix) else None
    if kind is not None:
        sections.sort(key=lambda s: not any(kind.search(key) for key in s[0]))
    for path, section in sections:
        keys = count_keys(section, prefix)
        beyond = next((section[k] for k in BEYOND if type(section.get(k)) is int and section[k] > 0), 0)
        if keys:
            if "decoder" in prefix and is_encoder_decoder(section) and keys[0] in _COUNTS:
                return Section(path, ("num_decoder_layers",), section[keys[0]], beyond)  # T5: as many as the encoder
            return Section(path, keys, section[keys[0]], beyond)
        listed = next((section[key] for key in _COUNTED if isinstance(section.get(key), list)), None)
        if listed:
            return Section(path, (), len(listed), beyond)
    return None


def is_encoder_decoder(config: Config) -> bool:
    return bool(config.get("is_encoder_decoder")) or any(key in config for key in _DECODER)


def section_of(config: Config, section: Section) -> Config:
    for key in section.path:
        config = config[key]
    return config


def nested_configs(config: Config, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Config]]:
    """The config and those nested in it, text first."""
    yield path, config
    nested = [key for key, value in config.items() if type(value) is dict and key.endswith("config")]
    for key in sorted(nested, key=lambda k: (k not in TEXT_CONFIGS, k)):
        if "quant" not in key:
            yield from nested_configs(config[key], (*path, key))


def count_keys(section: Config, prefix: str) -> tuple[str, ...]:
    """Those keys that hold the one count in question."""
    wanted: tuple[str, ...] = (*_COUNTS, *_ENCODER)
    if is_encoder_decoder(section):
        wanted = (*_DECODER, *(() if any(k in section for k in _DECODER) else _COUNTS))
        wanted = wanted if "decoder" in prefix else (*_ENCODER, *_COUNTS)
    found = [key for key in wanted if type(section.get(key)) is int and section[key] > 0]
    return tuple(key for key in found if section[key] == section[found[0]])
