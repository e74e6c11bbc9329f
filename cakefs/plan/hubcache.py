"""The Hugging Face cache shape of the models that came from a Hub: which folders, refs and listings there are.

    models--org--name/
      refs/main                  the commit, 40 hex digits without a newline
      snapshots/<commit>/…       the files as published, plain files
      trees/<commit>.json        the commit's list of files, as the client keeps it
      .no_exist/<commit>/…       answers every name that the commit does not have
      blobs/                     empty

What was published is shown, index and shards rather than the merged file: the client asks the Hub for what a commit
consists of (`snapshot_download` lists it, `hf_hub_download` sends HEAD) and takes as local what has that name here.
With the merged file alone it would want to download the shards; with both side by side loaders disagree on what to
read. It asks for a file only by its name here, never by size or hash (protocols.md, A6), so links into `blobs` would
gain nothing, and hide a file's ending from a loader that resolves them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from cakefs.model import Manifest, ManifestHead, Source, View
from cakefs.plan.wish import Wish, is_commit, is_repo, is_revision

_PREFIX = "models--"
_MAIN = "main"
_ENDING = re.compile(r".*\.[A-Za-z][A-Za-z0-9]*", re.DOTALL)


class HubPlace(NamedTuple):
    """Where a manifest belongs in the cache shape.

    Attributes:
        requested: The branch, tag or commit it was asked for as.
        whole: As in `Manifest`: only then is it known what the commit does not have.
    """

    repo: str
    commit: str
    requested: str
    created: int
    whole: bool = True


class HubRepo(NamedTuple):
    """One repository: manifest ids by commit, commits by ref; `whole` are the commits of which all is known."""

    repo: str
    commits: dict[str, str]
    refs: dict[str, str]
    whole: set[str]


def place_of(head: ManifestHead) -> HubPlace | None:
    """None for what is not a commit of a Hub's repository."""
    repo = urlsplit(head.origin).path.strip("/")
    pinned = head.sources and all(f"/resolve/{head.revision}/" in source.locator.url for source in head.sources)
    if head.substituted or not (pinned and head.requested and is_commit(head.revision) and is_repo(repo)):
        return None
    return HubPlace(repo, head.revision, head.requested, head.created, head.whole)


def folder_name(repo: str) -> str:
    return _PREFIX + repo.replace("/", "--")


def repo_of(folder: str) -> str | None:
    """The inverse of `folder_name`; None for what the client would not make."""
    repo = folder.removeprefix(_PREFIX).replace("--", "/", 1)
    return repo if folder.startswith(_PREFIX) and is_repo(repo) else None


def repositories(places: Mapping[str, HubPlace]) -> dict[str, HubRepo]:
    """Repositories by folder name, from places by manifest id. A ref means the commit that was added last for it, by
    the second."""
    found: dict[str, HubRepo] = {}
    for manifest_id, place in sorted(places.items(), key=lambda item: (item[1].created, item[0])):
        repo = found.setdefault(folder_name(place.repo), HubRepo(place.repo, {}, {}, set()))
        if place.whole or place.commit not in repo.whole:
            repo.commits[place.commit] = manifest_id
        if place.whole:
            repo.whole.add(place.commit)
        if place.requested != place.commit:
            repo.refs[place.requested] = place.commit
    return found


def wish_for_folder(folder: str) -> Wish | None:
    """What a client wants that looks for an unknown repository."""
    repo = repo_of(folder)
    return Wish(repo, None, repo) if repo else None


def wish_for_commit(repo: HubRepo, commit: str) -> Wish | None:
    """What a client wants that was told of an unknown commit by the Hub: most often, a branch has moved there."""
    if not is_commit(commit):
        return None
    branches = dict.fromkeys([_MAIN, *repo.refs])
    return Wish(repo.repo, commit, f"{repo.repo}@{commit}", tuple(branches))


def wish_for_ref(repo: HubRepo, ref: str) -> Wish | None:
    if ref == _MAIN:
        return Wish(repo.repo, None, repo.repo)
    if not is_revision(ref) or is_commit(ref) or ref == "refs":
        return None  # the client looks for a commit among the refs, too; `refs` is the first part of `refs/pr/1`
    return Wish(repo.repo, ref, f"{repo.repo}@{ref}")


def looks_like_file(name: str) -> bool:
    """Whether an absent name is that of a file, not of a folder such as `1_Pooling`: a lookup does not tell."""
    return _ENDING.fullmatch(name) is not None


def tree_listing(manifest: Manifest) -> bytes | None:
    """The commit's files as the client lists them in `trees/`; None where a git id is not known of each."""
    sources = {source.path: source for source in manifest.sources}
    files = {}
    for path in sorted(manifest.shown(View.ORIGINAL)):
        entry = _entry(sources[path]) if path in sources else None
        if entry is None:
            return None
        files[path] = entry
    return json.dumps({"format_version": 1, "files": files}, indent=1).encode()


def _entry(source: Source) -> dict[str, object] | None:
    size = source.locator.size
    algorithm, _, value = source.identity.partition(":")
    if algorithm == "git":
        return {"size": size, "blob_id": value}
    if algorithm != "sha256":
        return None
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value}\nsize {size}\n".encode()
    blob_id = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer, usedforsecurity=False).hexdigest()
    return {"size": size, "blob_id": blob_id, "lfs_sha256": value, "lfs_size": size}
