"""`cakefs show`: one model, its files and sources, or its tensors."""

import argparse
import time
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out, counted, human_size

if TYPE_CHECKING:
    from cakefs.engine.known.survey import FileSummary, SourceSummary, TensorSummary
    from cakefs.model import Manifest

HELP = "show a model: files, sources, revision, stack of layers; or its tensors"
VERIFIED = {True: "verified", False: "REFUTED", None: "not yet"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name as `cakefs ls` shows it")
    parser.add_argument("-t", "--tensors", action="store_true", help="its tensors, and the blobs that hold them")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.known import survey
    from cakefs.engine.known.shown import Local
    from cakefs.engine.models.ggufview import why_none

    with survey.open_store(config_of(args).store) as store:
        manifest = survey.find_model(store, args.model)
        local = Local.of_model(store, manifest)
        files = survey.summarize_files(manifest, local)
        sources = survey.summarize_sources(store, manifest)
        tensors = survey.summarize_tensors(manifest, local) if args.tensors else []
        no_gguf = "" if args.tensors or args.quiet else why_none(manifest, store)
        pinned = store.catalog.models.all()[args.model].pinned
    if args.json:
        facts = {"pinned": pinned, "no_gguf": no_gguf}
        out.json(_as_json(manifest, files, sources, tensors if args.tensors else None) | facts)
    elif args.tensors:
        _show_tensors(tensors, out)
    else:
        _show_files(manifest, files, sources, no_gguf, out, pinned=pinned)
    return 0


def _show_files(
    manifest: "Manifest",
    files: list["FileSummary"],
    sources: list["SourceSummary"],
    no_gguf: str,
    out: Out,
    *,
    pinned: bool,
) -> None:
    from cakefs.plan.derived import is_derived

    shown = [f for f in files if f.in_model]
    if not out.quiet:
        own = [f for f in shown if not is_derived(manifest, f.path)]
        size, local = sum(f.size for f in own), sum(f.local_bytes for f in own)
        out.line(f"name      {manifest.name}")
        out.line(f"origin    {manifest.origin}")
        if manifest.substituted:
            out.line(f"          SUBSTITUTED: {manifest.substituted}; this is not what was published")
        if manifest.revision:
            out.line(f"revision  {manifest.revision} ({manifest.requested})")
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.created))
        out.line(f"added     {day}{', pinned' * pinned}")
        out.line(f"size      {human_size(size)}, {human_size(local)} local, {counted(len(manifest.tensors), 'tensor')}")
        if no_gguf:
            out.line(f"no GGUF   {no_gguf}")
        out.line("")
        _show_stack(manifest, out)
    out.table(("FILE", ">SIZE", ">LOCAL"), [(f.path, human_size(f.size), human_size(f.local_bytes)) for f in shown])
    if out.quiet:
        return
    out.line("")
    out.table(
        ("SOURCE", ">SIZE", "SHA-256", "TENSORS", "IDENTITY"),
        [
            (s.path, human_size(s.size), VERIFIED[s.verified] if s.sha256 else "-", _dtypes(s), s.identity)
            for s in sources
        ],
    )


def _dtypes(source: "SourceSummary") -> str:
    return ", ".join(f"{count} {dtype}" for dtype, count in source.dtypes.items()) or "-"


def _show_stack(manifest: "Manifest", out: Out) -> None:
    from cakefs.cli.stack import REPEATED, draw_stack

    if manifest.stack:
        for line in draw_stack(manifest.stack):
            out.picture(line, REPEATED)
        out.line("")


def _show_tensors(tensors: list["TensorSummary"], out: Out) -> None:
    several = len({t.source for t in tensors}) > 1
    out.table(
        ("TENSOR", "DTYPE", "SHAPE", ">SIZE", ">LOCAL", "DIGEST", *(["FILE"] if several else [])),
        [
            (t.name, t.dtype, "x".join(map(str, t.shape)), human_size(t.size), human_size(t.local_bytes), t.digest)
            + ((t.source,) if several else ())
            for t in tensors
        ],
    )


def _as_json(
    manifest: "Manifest",
    files: list["FileSummary"],
    sources: list["SourceSummary"],
    tensors: list["TensorSummary"] | None,
) -> dict[str, object]:
    from cakefs.cli.stack import stack_as_json

    names = ("name", "origin", "revision", "requested", "created", "substituted")
    facts = {name: getattr(manifest, name) for name in names}
    lists: dict[str, object] = {
        "files": [f._asdict() for f in files],
        "sources": [s._asdict() for s in sources],
        "stack": stack_as_json(manifest.stack),
    }
    if tensors is not None:
        lists["tensors"] = [t._asdict() for t in tensors]
    return facts | lists
