"""Files of a model's directory that hold nothing of their own but a header. Pure."""

from cakefs.model import File, Manifest, View
from cakefs.plan.gguf_compose import split_sets
from cakefs.plan.view import WEIGHTS

GGUF = "model.gguf"


def own_files(manifest: Manifest) -> dict[str, File]:
    """The model directory without what is made of other files there: what the model weighs, and what a copy needs."""
    derived = _derived(manifest)
    return {path: file for path, file in manifest.shown(View.MODEL).items() if path not in derived}


def is_derived(manifest: Manifest, path: str) -> bool:
    """Whether the file is made of others beside it: the safetensors as `model.gguf`, the parts of a split as one."""
    return path in _derived(manifest)


def _derived(manifest: Manifest) -> set[str]:
    files = manifest.shown(View.MODEL)
    published = [source.path for source in manifest.sources]
    made = {path for path in split_sets(published) if path in files and files[path].view is View.MODEL}
    if any(path.endswith(".gguf") for path in published):
        return made
    return {GGUF} if GGUF in files and WEIGHTS in files and files[GGUF].view is View.MODEL else set()
