"""The names that models are shown under: what may be one, and who has it."""

from cakefs.errors import UserError
from cakefs.model import Manifest, View
from cakefs.store.store import Store


def model_name(name: str) -> str:
    """A name to show a model under, checked. Raises UserError."""
    parts = name.split("/")
    if any(p in ("", ".", "..") or p.startswith(".") or not p.isprintable() or len(p.encode()) > 200 for p in parts):
        raise UserError(f"bad model name {name!r}", hint="use org/name or a plain word, without a leading dot")
    return name


def check_place(store: Store, manifest: Manifest) -> None:
    """Refuses a name that a file of another model would hide in the mount, or whose files would hide another model."""
    name, known = manifest.name, store.catalog.models.all()
    for other in known:
        outer, inner = (other, name) if name.startswith(other + "/") else (name, other)
        if not inner.startswith(outer + "/"):
            continue
        files = manifest if outer == name else store.catalog.models.manifest(known[outer].manifest)
        first = inner[len(outer) + 1 :].partition("/")[0]
        if any(path.partition("/")[0] == first for path in files.shown(View.MODEL)):
            raise UserError(f"{inner} would be hidden by a file of {outer}", hint="choose another --as NAME")


def same_model(a: Manifest, b: Manifest) -> bool:
    """Whether two manifests show the same content at the same revision; only the day of adding may differ."""
    return same_files(a, b) and (a.spans, a.tensors, a.files) == (b.spans, b.tensors, b.files)


def same_files(a: Manifest, b: Manifest) -> bool:
    """Whether two manifests are of the same published files, whatever is read out of them."""
    return (a.origin, a.revision, a.sources) == (b.origin, b.revision, b.sources)
