"""Repositories as the Hub knows them: commits, branches, who may see them, and what is published about each file."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.hub.content import Content

Json = dict[str, Any]


class Entry:
    """A file of a commit."""

    def __init__(self, path: str, content: Content, lfs: bool) -> None:
        self.path = path
        self.content = content
        self.lfs = lfs

    def oid(self) -> str:
        """Git blob id: of the pointer for an LFS file."""
        return Content(self.content.pointer()).git_id() if self.lfs else self.content.git_id()

    def info(self) -> Json:
        value: Json = {"type": "file", "oid": self.oid(), "size": self.content.size, "path": self.path}
        if self.lfs:
            pointer = self.content.pointer()
            value["lfs"] = {"oid": self.content.sha256(), "size": self.content.size, "pointerSize": len(pointer)}
        return value

    def sibling(self, blobs: bool) -> Json:
        """Entry of a model's `siblings`."""
        info = self.info() if blobs else {}
        value: Json = {"rfilename": self.path}
        if blobs:
            value |= {"size": info["size"], "blobId": info["oid"]}
        if "lfs" in info:
            value["lfs"] = {
                "sha256": info["lfs"]["oid"],
                "size": info["size"],
                "pointerSize": info["lfs"]["pointerSize"],
            }
        return value


Commit = dict[str, Entry]


@dataclass
class Repo:
    name: str
    token: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Mapping[str, Content], lfs: Callable[[str, int], bool]) -> str:
        """Makes a commit whose whole content is `files`, and moves the branch to it."""
        entries = {path: Entry(path, files[path], lfs(path, files[path].size)) for path in sorted(files)}
        text = "\n".join([self.name, str(len(self.commits)), *entries])
        commit = hashlib.sha1(text.encode("utf-8", "surrogateescape")).hexdigest()
        self.commits[commit] = entries
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """Commit of a branch, of `HEAD`, of a hash or of the start of one."""
        if revision in self.branches:
            return self.branches[revision]
        if revision == "HEAD":
            return self.branches.get("main")
        found = [c for c in self.commits if len(revision) >= 7 and c.startswith(revision)]
        return found[0] if len(found) == 1 else None

    def info(self, commit: str, blobs: bool) -> Json:
        when = datetime(2026, 1, 1, tzinfo=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {
            "_id": hashlib.sha1(self.name.encode()).hexdigest()[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.rpartition("/")[0],
            "sha": commit,
            "lastModified": when,
            "createdAt": when,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [entry.sibling(blobs) for entry in self.commits[commit].values()],
        }

    def tree(self, commit: str, folder: str, recursive: bool) -> list[Json] | None:
        """Entries below a folder as the tree endpoint lists them, or None when there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        found: dict[str, Json] = {}
        for path, entry in self.commits[commit].items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                directory = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(f"tree {commit} {directory}".encode()).hexdigest()
                found[directory] = {"type": "directory", "oid": oid, "size": 0, "path": directory}
            if recursive or len(parts) == 1:
                found[path] = entry.info()
        return None if folder and not found else [found[path] for path in sorted(found)]

    def refs(self) -> Json:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in self.branches.items()
            if not name.startswith("refs/")
        ]
        return {"branches": branches, "tags": [], "converts": [], "pullRequests": []}
