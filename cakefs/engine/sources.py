"""What a user calls a source -> a listing of the files there. The only place that tells kinds of sources apart."""

import re
from typing import NamedTuple

from cakefs.config import Config
from cakefs.errors import UserError
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


def parse_source(text: str, revision: str | None) -> HubSource | UrlSource:
    """Raises UserError for what is no source."""
    if re.match(r"https?://", text):
        if revision:
            raise UserError(f"{text} has no revisions", hint="leave out --revision")
        return UrlSource(text)
    repo, at, suffix = text.partition("@")
    if at and revision:
        raise UserError(f"revision given twice: {suffix!r} and {revision!r}")
    if (at and not suffix) or not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UserError(f"not a model: {text!r}", hint="org/name, org/name@revision or an https:// address")
    return HubSource(repo, revision or (suffix if at else None))


def default_name(source: HubSource | UrlSource) -> str:
    """What a source is shown as when the user does not say: org/name[@rev], or the host and directory of a URL."""
    if isinstance(source, HubSource):
        return f"{source.repo}@{source.revision}" if source.revision else source.repo
    path = re.sub(r"^https?://[^/]+/?|[?#].*$", "", source.url)
    parts = [p for p in path.split("/") if p and not p.startswith(".")]
    stem = re.sub(r"\.(safetensors|gguf)(\.index(\.\w+)?\.json)?$", "", parts[-1]) if parts else ""
    parents = [p for p in parts[:-1] if p not in ("resolve", "main", "raw")]
    if stem in ("model", "") and parents:
        return "/".join(parents[-2:])
    return stem or "model"


async def list_source(source: HubSource | UrlSource, config: Config, token: str | None, http: HttpRemote) -> Listing:
    """Raises NotFound, AccessDenied, RemoteUnavailable; UserError offline."""
    if config.offline:
        raise UserError("cannot add a model offline", hint="leave out --offline and unset HF_HUB_OFFLINE")
    if isinstance(source, UrlSource):
        return await web.list_url(source.url, http, hubs=(config.endpoint, *web.HUBS))
    return await hub.list_repo(source.repo, source.revision, endpoint=config.endpoint, token=token)
