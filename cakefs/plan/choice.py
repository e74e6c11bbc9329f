"""Which files and spans a command is about. Pure."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from cakefs.model import File, Manifest, View, leaves
from cakefs.plan.derived import own_files
from cakefs.plan.requests import gaps


def chosen_files(manifest: Manifest, patterns: Sequence[str]) -> list[File]:
    """Files of the model directory whose path matches any of the globs; all without a glob."""
    files = (manifest.shown(View.MODEL) if patterns else own_files(manifest)).items()
    return [file for path, file in files if not patterns or any(fnmatchcase(path, p) for p in patterns)]


def file_spans(manifest: Manifest, files: Iterable[File]) -> list[int]:
    """The spans of the files and the `gaps` between them, each content once, in the order of their bytes upstream."""
    spans = {s.span for f in files for segment in f.segments for s in leaves(segment) if s.size}
    return in_order(manifest, spans | gaps(manifest, spans))


def in_order(manifest: Manifest, spans: Iterable[int]) -> list[int]:
    """As a pull takes them; of several with the same bytes (a file that is published twice) one."""
    places = sorted((manifest.spans[i].source, manifest.spans[i].start, i) for i in spans)
    numbers: dict[str, int] = {}
    contents = [numbers.setdefault(source.identity, len(numbers)) for source in manifest.sources]
    first: dict[tuple[int, int, int], int] = {}
    for source, start, i in places:
        first.setdefault((contents[source], start, manifest.spans[i].stop), i)
    return list(first.values())
