"""`model.gguf` made of a model's safetensors: what adding, slicing and merging do for it, and why a model has none."""

import logging
from collections.abc import Awaitable, Callable

from cakefs.engine.models.smallfiles import small_files
from cakefs.model import Manifest, View
from cakefs.plan.view import WEIGHTS, PutLiteral
from cakefs.store.store import Store

log = logging.getLogger(__name__)


async def fetch_tokenizers(manifest: Manifest, store: Store, fetch: Callable[[str], Awaitable[object]]) -> None:
    """Brings the vocabulary into the store: files of up to some dozen MiB, which `add` leaves where they are else."""
    from cakefs.plan.ggufview.build import needed_tokenizers  # not for those who only look at models

    for path in needed_tokenizers(manifest, small_files(store)):
        await fetch(path)


def show_gguf(manifest: Manifest, store: Store, put_literal: PutLiteral) -> Manifest:
    """The manifest with the file, or as it is where the model has no such form."""
    from cakefs.plan.ggufview.build import with_gguf

    made, refused = with_gguf(manifest, small_files(store), put_literal)
    if refused:
        log.debug("%s has no GGUF form: %s", manifest.name, refused)
    return made


def why_none(manifest: Manifest, store: Store) -> str:
    """Why a model in safetensors shows no GGUF file; empty where it does."""
    from cakefs.plan.ggufview.build import with_gguf

    if WEIGHTS not in manifest.shown(View.MODEL):
        return ""
    return with_gguf(manifest, small_files(store), lambda data: "none:00").refused
