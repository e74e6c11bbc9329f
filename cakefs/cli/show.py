"""`cakefs show`: one model, its files and sources, or its tensors."""

import argparse
import time
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out, counted, human_size

if TYPE_CHECKING:
    from cakefs.engine.survey import FileSummary, SourceSummary, TensorSummary
    from cakefs.model import Manifest

HELP = "show a model: files, sources, revision, stack of layers; or its tensors"
VERIFIED = {True: "verified", False: "REFUTED", None: "not yet"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name as `cakefs ls` shows it")
    parser.add_argument("-t", "--tensors", action="store_true", help="its tensors, and the blobs that hold them")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine import survey

    with survey.open_store(config_of(args).store) as store:
        manifest = survey.find_model(store, args.model)
        local = survey.Local.of_model(store, manifest)
        files = survey.summarize_files(manifest, local)
        sources = survey.summarize_sources(store, manifest)
        tensors = survey.summarize_tensors(manifest, local) if args.tensors else []
    if args.json:
        out.json(_as_json(manifest, files, sources, tensors if args.tensors else None))
    elif args.tensors:
        _show_tensors(tensors, out)
    else:
        _show_files(manifest, files, sources, out)
    return 0


def _show_files(manifest: "Manifest", files: list["FileSummary"], sources: list["SourceSummary"], out: Out) -> None:
    shown = [f for f in files if f.in_model]
    if not out.quiet:
        size, local = sum(f.size for f in shown), sum(f.local_bytes for f in shown)
        out.line(f"name      {manifest.name}")
        out.line(f"origin    {manifest.origin}")
        if manifest.revision:
            out.line(f"revision  {manifest.revision} ({manifest.requested})")
        out.line(f"added     {time.strftime('%Y-%m-%d %H:%M', time.localtime(manifest.created))}")
        out.line(f"size      {human_size(size)}, {human_size(local)} local, {counted(len(manifest.tensors), 'tensor')}")
        out.line("")
        _show_stack(manifest, out)
    out.table(("FILE", ">SIZE", ">LOCAL"), [(f.path, human_size(f.size), human_size(f.local_bytes)) for f in shown])
    if out.quiet:
        return
    out.line("")
    out.table(
        ("SOURCE", ">SIZE", "SHA-256", "IDENTITY"),
        [(s.path, human_size(s.size), VERIFIED[s.verified] if s.sha256 else "-", s.identity) for s in sources],
    )


def _show_stack(manifest: "Manifest", out: Out) -> None:
    from cakefs.cli.stack import REPEATED, draw_stack

    if manifest.stack:
        for line in draw_stack(manifest.stack):
            out.picture(line, REPEATED)
        out.line("")


def _show_tensors(tensors: list["TensorSummary"], out: Out) -> None:
    out.table(
        ("TENSOR", "DTYPE", "SHAPE", ">SIZE", ">LOCAL", "DIGEST"),
        [
            (t.name, t.dtype, "x".join(map(str, t.shape)), human_size(t.size), human_size(t.local_bytes), t.digest)
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

    facts = {name: getattr(manifest, name) for name in ("name", "origin", "revision", "requested", "created")}
    lists: dict[str, object] = {
        "files": [f._asdict() for f in files],
        "sources": [s._asdict() for s in sources],
        "stack": stack_as_json(manifest.stack),
    }
    if tensors is not None:
        lists["tensors"] = [t._asdict() for t in tensors]
    return facts | lists
