"""Quantization settings name single layers; these follow their layers into a view. Pure."""

from collections.abc import Mapping, Sequence

from cakefs.model import View
from cakefs.plan.layernames import Renames, map_names
from cakefs.plan.modelconfig import Take
from cakefs.plan.parents import QUANTIZATION, Parent
from cakefs.plan.sections import Config, encode_config, parse_config
from cakefs.plan.view import ReadSmall, ViewBuilder

_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def map_quantization(
    builder: ViewBuilder,
    config: Config,
    parents: Sequence[Parent],
    donor: int,
    places: Mapping[Take, Sequence[int]],
    read_small: ReadSmall,
) -> None:
    """Maps names of layers in the new config and in the files that some tools keep beside it.

    Args:
        config: The donor's, rewritten already; changed in place.
        parents: All whose tensors are used, in the order in which `places` counts them.
        places: Where their layers went.

    Raises:
        UserError: The models are quantized differently, or a pattern hides a layer's number.
    """
    depths = sum(len(parent.layers) for parent in parents)
    if len(places) == depths and all(tuple(numbers) == (take.layer,) for take, numbers in places.items()):
        return  # Every layer stays where it is.
    renames = Renames(parents[donor].prefix, places)
    for key in QUANTIZATION:
        values = [parent.config.get(key) for parent in parents]
        if any(value is not None for value in values):
            mapped = map_names(values, renames, donor, key)
            if config.get(key) is not None:
                config[key] = mapped
    for path in _FILES:
        files = [parent.manifest.shown(View.MODEL).get(path) for parent in parents]
        if files[donor] is not None:
            read = [
                parse_config(read_small(parent.manifest, path), path) if file else None
                for parent, file in zip(parents, files, strict=True)
            ]
            builder.add_bytes(path, encode_config(map_names(read, renames, donor, path)))
