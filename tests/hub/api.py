"""The first host: the part of the Hub's HTTP API that a model download uses, with its errors.

Small files are redirected within the host (`resolve-cache`), LFS files to the CDN; metadata are on the redirect itself.
"""

from typing import NamedTuple
from urllib.parse import parse_qs, quote, urlencode

from tests.hub.cdn import Links
from tests.hub.http import Answer, Incoming, data_answer, file_answer, json_answer
from tests.hub.repos import Entry, Json, Repo

VERBS = frozenset(["revision", "tree", "paths-info", "refs", "auth-check", "resolve", "raw"])
Routed = tuple[str, str, Answer]


class Place(NamedTuple):
    """A repository as named in a URL, and the parts of the path after that name."""

    repo: str
    rest: list[str]


class Api:
    """Routes of the Hub's host: answers come with their stage and the path of the file or repository they are about."""

    def __init__(self, links: Links, page_size: int) -> None:
        self.links = links
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self.endpoint = ""
        self.cdn_endpoint = ""
        self.page_size = page_size

    def __call__(self, incoming: Incoming) -> Routed:
        stage, path, answer = self._route(incoming)
        bucket = "resolvers" if stage in ("resolve", "cache") else "api"
        limits = {
            "RateLimit": f'"{bucket}";r=2999;t=300',
            "RateLimit-Policy": f'"fixed window";"{bucket}";q=3000;w=300',
        }
        return stage, path, answer.with_headers(**limits)

    def _route(self, incoming: Incoming) -> Routed:
        segments = incoming.segments
        if segments[:2] == ["api", "models"] and len(segments) > 2:
            place = locate(segments[2:])
            return "api", place.repo, self._api(incoming, place)
        if segments[:3] == ["api", "resolve-cache", "models"] and len(segments) > 5:
            repo, commit, path = "/".join(segments[3:5]), segments[5], "/".join(segments[6:])
            return "cache", f"{repo}/{path}", self._file(incoming, repo, commit, path, "cache")
        place = locate(segments)
        if len(place.rest) >= 3 and place.rest[0] in ("resolve", "raw"):
            verb, revision, path = place.rest[0], place.rest[1], "/".join(place.rest[2:])
            return "resolve", f"{place.repo}/{path}", self._file(incoming, place.repo, revision, path, verb)
        return (
            "api",
            incoming.target.partition("?")[0],
            problem(404, "Sorry, we can't find the page you are looking for."),
        )

    def _api(self, incoming: Incoming, place: Place) -> Answer:
        refused = self._refuse(incoming, place.repo)
        if refused:
            return refused
        repo = self.repos[place.repo]
        verb = place.rest[0] if place.rest else "revision"
        if verb == "refs":
            return json_answer(repo.refs())
        if verb == "auth-check":
            return self._refuse_files(incoming, repo) or json_answer({})
        revision = place.rest[1] if len(place.rest) > 1 else "main"
        commit = repo.resolve(revision)
        if commit is None:
            return problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if verb == "tree":
            return self._tree(incoming, repo, commit, "/".join(place.rest[2:]))
        if verb == "paths-info":
            return paths_info(incoming, repo, commit)
        info = repo.info(commit, "blobs" in incoming.query)
        expand = incoming.query.get("expand")
        return json_answer({k: v for k, v in info.items() if k in ("_id", "id", *expand)} if expand else info)

    def _tree(self, incoming: Incoming, repo: Repo, commit: str, folder: str) -> Answer:
        query = {name: values[0] for name, values in incoming.query.items()}
        expand = query.get("expand", "").lower() in ("true", "1")
        entries = repo.tree(commit, folder, query.get("recursive", "").lower() in ("true", "1"))
        if entries is None:
            return problem(404, f"{folder} does not exist on {commit}", "EntryNotFound", {"X-Repo-Commit": commit})
        start = int(query.get("cursor", "0"))
        stop = start + (min(self.page_size, 50) if expand else self.page_size)
        headers = {}
        if stop < len(entries):
            path = incoming.target.partition("?")[0]
            following = urlencode({**query, "cursor": stop})
            headers["Link"] = f'<{self.endpoint}{path}?{following}>; rel="next"'
        page = [expanded(e, commit) if expand else e for e in entries[start:stop]]
        return json_answer(page, headers)

    def _file(self, incoming: Incoming, repo: str, revision: str, path: str, verb: str) -> Answer:
        refused = self._refuse(incoming, repo) or self._refuse_files(incoming, self.repos[repo])
        if refused:
            return refused
        commit = self.repos[repo].resolve(revision)
        if commit is None:
            return problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        entry = self.repos[repo].commits[commit].get(path)
        if entry is None:
            return problem(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        if verb == "raw":
            body = entry.content.pointer() if entry.lfs else entry.content.read(0, entry.content.size)
            return data_answer(200, body, "text/plain; charset=utf-8", {"X-Repo-Commit": commit})
        return self._resolved(incoming, repo, commit, entry, verb)

    def _resolved(self, incoming: Incoming, repo: str, commit: str, entry: Entry, verb: str) -> Answer:
        headers = {"X-Repo-Commit": commit}
        if entry.lfs:
            location = self.cdn_endpoint + self.links.sign(f"{repo}/{entry.path}", entry.content)
            headers |= {"X-Linked-Size": str(entry.content.size), "X-Linked-ETag": f'"{entry.content.sha256()}"'}
            headers |= {"Accept-Ranges": "bytes", "Location": location}
            return data_answer(302, f"Found. Redirecting to {location}".encode(), "text/plain; charset=utf-8", headers)
        etag = f'"{entry.oid()}"'
        if verb == "cache":
            return file_answer(incoming, entry.content, {**headers, "ETag": etag, "Content-Type": "text/plain"})
        where = f"/api/resolve-cache/models/{repo}/{commit}/{quote(entry.path)}"
        headers["Location"] = f"{where}?{quote(incoming.target.partition('?')[0], safe='')}=&etag={quote(etag)}"
        return data_answer(307, b"Temporary Redirect. Redirecting to " + where.encode(), "text/plain", headers)

    def _refuse(self, incoming: Incoming, name: str) -> Answer | None:
        """What a caller gets who may not know of the repository."""
        token = incoming.header("authorization").removeprefix("Bearer ")
        if token and token not in self.tokens:
            message = "Invalid credentials in Authorization header"
            return problem(401, message, headers={"X-Error-Message": message})
        repo = self.repos.get(name)
        if repo is None or (repo.private and token != repo.token):
            if token:
                return problem(404, "Repository not found", "RepoNotFound")
            return problem(401, "Invalid username or password.", "RepoNotFound")
        return None

    def _refuse_files(self, incoming: Incoming, repo: Repo) -> Answer | None:
        """What a caller gets who may know of the repository but not read its files."""
        token = incoming.header("authorization").removeprefix("Bearer ")
        if not repo.gated or token == repo.token:
            return None
        message = (
            f"Access to model {repo.name} is restricted. You must have access to it and be authenticated to access it."
        )
        return problem(403 if token else 401, message, "GatedRepo")


def locate(segments: list[str]) -> Place:
    """Splits `org/name/verb/...`, or `name/verb/...` of an old repository without an organisation."""
    count = 1 if len(segments) > 1 and segments[1] in VERBS else 2
    return Place("/".join(segments[:count]), segments[count:])


def paths_info(incoming: Incoming, repo: Repo, commit: str) -> Answer:
    form = parse_qs(incoming.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    known = {e["path"]: e for e in repo.tree(commit, "", True) or []}
    found = [known[path] for path in form.get("paths", []) if path in known]
    return json_answer([expanded(e, commit) if expand else e for e in found])


def expanded(entry: Json, commit: str) -> Json:
    last = {"id": commit, "title": "Upload", "date": "2026-01-01T00:00:00.000Z"}
    return {**entry, "lastCommit": last}


def problem(status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> Answer:
    named = {"X-Error-Code": code} if code else {}
    return json_answer({"error": message}, {"X-Error-Message": message, **named, **(headers or {})}, status)
