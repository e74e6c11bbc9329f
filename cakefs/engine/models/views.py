"""Slices and merges: a recipe and the models here -> another model here, for the price of a header. Fetches nothing.

    parents in the catalog ─► plan/slice, plan/merge: manifest ─► header and config as literals ─► catalog

A view names the spans of its parents itself, so removing or updating them takes nothing from it. Nothing is shown until
all of it is in the store; what a failure leaves there is for gc.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, Unpack

from cakefs.engine.known.naming import check_place, model_name, same_model
from cakefs.engine.known.shown import Shown, put_model
from cakefs.engine.known.survey import find_model
from cakefs.engine.models.ggufview import show_gguf
from cakefs.engine.models.smallfiles import small_files
from cakefs.errors import CorruptData, InvalidFormat, NotFound, UserError
from cakefs.model import MIB, Digest, Manifest, SpanKey, View, encode_manifest
from cakefs.plan.merge import build_merge
from cakefs.plan.recipe import Recipe, parse_recipe, referenced
from cakefs.plan.slice import Composed, SliceOptions, build_slice
from cakefs.plan.view import WEIGHTS, PutLiteral, ReadSmall
from cakefs.store.store import Store

RECIPE_LIMIT = MIB  # Bytes of a recipe file; a longer one is another file.
_COMMIT_LENGTH = 7  # Hex digits of a commit that are enough to mean it.


class Made(NamedTuple):
    """A view that was made.

    Attributes:
        changed: False when the name stood for the very same view before.
        new_bytes: What the store took for it: header, config, manifest.
    """

    manifest: Manifest
    warnings: tuple[str, ...]
    changed: bool
    new_bytes: int

    @property
    def layers(self) -> int:
        return len(self.manifest.stack)

    @property
    def size(self) -> int:
        """Bytes of its weight file."""
        return self.manifest.shown(View.MODEL)[WEIGHTS].size


@contextmanager
def no_collection() -> Iterator[None]:
    """A plan is a million objects, all of them alive: looking for garbage among them took a quarter of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@no_collection()
def slice_model(
    store: Store, model: str, layers: str, name: str, *, update: bool = False, **options: Unpack[SliceOptions]
) -> Made:
    """Shows some layers of a model under a name of their own; arguments as `build_slice` takes them.

    Args:
        update: Let a name that is taken stand for this from now on.

    Raises:
        UserError: A model, layer or prefix that is not there, or a name that is taken.
    """
    build = partial(build_slice, _find(store, model) or find_model(store, model), layers, **options)
    return make_view(store, name, build, update=update)


@no_collection()
def merge_models(store: Store, recipe: Recipe, name: str, *, prefix: str = "", update: bool = False) -> Made:
    """Shows what a recipe describes under a name; arguments as in `slice_model`.

    Raises:
        UserError: Naming the entry of the recipe that cannot be what it says.
    """
    models = {ref.name: found for ref in referenced(recipe) if (found := _find(store, ref.name)) is not None}

    def digest_of(key: SpanKey) -> str | None:
        blob = store.catalog.find(key)
        return None if blob is None else blob.digest

    build = partial(build_merge, recipe, models, prefix=prefix, digest_of=digest_of)
    return make_view(store, name, build, update=update)


def read_recipe(path: Path) -> Recipe:
    """Raises UserError for a file that cannot be read or is no recipe."""
    try:
        with path.open("rb") as file:
            data = file.read(RECIPE_LIMIT + 1)
        if len(data) > RECIPE_LIMIT:
            raise UserError(f"{path} is too long for a recipe")
        return parse_recipe(data.decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(
            f"no recipe {path}", hint="to repeat layers of a model: --repeat-map or --ratio-repeat"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text") from error


def _find(store: Store, name: str) -> Manifest | None:
    """The model of that name; for `name@rev` also the one called `name`, where it is at that revision."""
    known = store.catalog.models.all()
    if name in known:
        return store.catalog.models.manifest(known[name].manifest)
    plain, _, revision = name.rpartition("@")
    if not revision or plain not in known:
        return None
    manifest = store.catalog.models.manifest(known[plain].manifest)
    is_commit = len(revision) >= _COMMIT_LENGTH and manifest.revision.startswith(revision)
    return manifest if is_commit or manifest.requested == revision else None


class _Build(Protocol):
    """`build_slice` or `build_merge`, with what they are to make known."""

    def __call__(self, *, name: str, created: int, read_small: ReadSmall, put_literal: PutLiteral) -> Composed: ...


def make_view(store: Store, name: str, build: _Build, *, update: bool) -> Made:
    """Shows what `build` makes under a name. Raises UserError for a name that is taken, and what `build` raises."""
    model_name(name)
    literals: dict[Digest, int] = {}

    def put_literal(data: bytes) -> Digest:
        known = store.has_literal(data)
        digest = store.put_literal(data)
        literals.setdefault(digest, 0 if known else len(data))
        return digest

    with store.guard():
        made = build(name=name, created=int(time.time()), read_small=small_files(store), put_literal=put_literal)
        made = made._replace(manifest=show_gguf(made.manifest, store, put_literal))
        check_place(store, made.manifest)
        before = store.catalog.models.all().get(name)
        old = _readable(store, before.manifest) if before is not None else None
        if old is not None and same_model(old, made.manifest):
            return Made(old, made.warnings, False, sum(literals.values()))
        if before is not None and not update:
            was = f", from {old.origin}" if old is not None else ""
            raise UserError(f"{name} is already here{was}", hint="another --as NAME, or --update to replace it")
        put_model(store, made.manifest, Shown.of(made.manifest))
    return Made(made.manifest, made.warnings, True, sum(literals.values()) + len(encode_manifest(made.manifest)))


def _readable(store: Store, manifest_id: str) -> Manifest | None:
    """None for one that is damaged: it may be replaced."""
    try:
        return store.catalog.models.manifest(manifest_id)
    except (CorruptData, InvalidFormat, NotFound):
        return None
