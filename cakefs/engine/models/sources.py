"""What a user calls a source -> a listing of the files there. The only place that tells kinds of sources apart."""

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from cakefs.config import Config
from cakefs.errors import RemoteUnavailable, UserError
from cakefs.model import Listing
from cakefs.remotes import hub, web
from cakefs.remotes.http import HttpRemote

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}|[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class HubSource(NamedTuple):
    """`org/name` at a revision; None is the default branch."""

    repo: str
    revision: str | None


class UrlSource(NamedTuple):
    """A file on a plain HTTP(S) server."""

    url: str


def local_path(text: str) -> Path | None:
    """The directory or file that a source is, if it is one.

    Told by how it is written, so that no directory that happens to be here stands for a model of the Hub.
    """
    named = text.startswith(("/", "./", "../", "~")) or text in (".", "..")
    url = re.match(r"https?://", text)
    if named or (not url and text.endswith((".safetensors", ".gguf")) and Path(text).exists()):
        return Path(os.path.expanduser(text))
    return None


def parse_source(text: str, revision: str | None) -> HubSource | UrlSource:
    """Raises UserError for what is no source."""
    if re.match(r"https?://", text):
        if revision:
            raise UserError(f"{text} has no revisions", hint="leave out --revision")
        web.checked_url(text)
        return UrlSource(text)
    repo, at, suffix = text.partition("@")
    if at and revision:
        raise UserError(f"revision given twice: {suffix!r} and {revision!r}")
    if revision == "":
        raise UserError("an empty revision", hint="leave out --revision for the default branch")
    if (at and not suffix) or not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UserError(f"not a model: {text!r}", hint="org/name, org/name@revision, an https:// address, ./directory")
    return HubSource(repo, revision or (suffix if at else None))


def default_name(source: HubSource | UrlSource) -> str:
    """What a source is shown as when the user does not say: org/name[@rev], or the last two of host, folders, file."""
    if isinstance(source, HubSource):
        return f"{source.repo}@{source.revision}" if source.revision else source.repo
    url = urlsplit(source.url)
    parts = [part for part in map(_plain, url.path.split("/")) if part]
    stem = re.sub(r"\.(safetensors|gguf)(\.index(\.\w+)?\.json)?$", "", parts[-1]) if parts else ""
    parents = [p for p in parts[:-1] if p not in ("resolve", "main", "raw")]
    directory = [url.hostname or "", *parents][-2:]
    return "/".join(directory if stem in ("model", "") else [*directory[-1:], stem])


def _plain(part: str) -> str:
    """A part of a URL's path as a name of a directory; empty for one that must not be."""
    return unquote(part).replace("/", "-").replace("\0", "").lstrip(".")


async def list_source(source: HubSource | UrlSource, config: Config, token: str | None, http: HttpRemote) -> Listing:
    """Raises NotFound, AccessDenied, RemoteUnavailable."""
    if config.offline:
        raise RemoteUnavailable(
            "cannot add a model offline", hint="leave out --offline and unset HF_HUB_OFFLINE, or cakefs import"
        )
    if isinstance(source, UrlSource):
        return await web.list_url(source.url, http, hubs=(config.endpoint, *web.HUBS))
    return await hub.list_repo(source.repo, source.revision, endpoint=config.endpoint, token=token)
