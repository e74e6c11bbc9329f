"""Which names may be models of the Hub that nobody has added yet. All other names stay on this machine.

The mount sees nothing but lookups, and most of those for unknown names are not a user's: editors look for swap files,
desktops for `autorun.inf` and `DCIM`, git for `HEAD`, Node for `node_modules`. So a name must be a repository's by the
Hub's grammar, must not look like a file, and must not be one that programs are known to look for. A model whose name
falls to this can still be added by hand.
"""

import re
from typing import NamedTuple

_WORD = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_REPO = re.compile(rf"(?:{_WORD}/)?{_WORD}", re.ASCII)
_NAMESPACE = re.compile(r"[A-Za-z0-9](?:[\w-]{0,94}\w)?", re.ASCII)  # with a dot it is a file, by far more often
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

_FILES = re.compile(
    r".*\.(bak|bat|bin|c|cfg|ckpt|cmd|conf|cpp|css|csv|db|desktop|directory|dll|env|exe|git|gguf|gz|h|htm|html|ico"
    r"|incomplete|inf|ini|ipynb|jinja|jpe?g|js|json|jsonl|lnk|lock|log|md|model|mjs|msgpack|npz|old|onnx|orig|part"
    r"|pdf|php|pid|pkl|png|pth?|py|pyc|rar|rs|safetensors|sh|so|sock|sqlite|sum|sw[a-p]|tar|tgz|tmp|toml|ts|txt|xml"
    r"|ya?ml|zip)",
    re.IGNORECASE | re.DOTALL,
)
_PROBED = re.compile(
    # desktops look at the top of a volume to tell what it is
    r"audio_ts|autorun|bdmv|cdplus|certificate|dcim|desktop|mpeg2|mpegav|pnambic|private|recycler|rr_moved|svcd|trash"
    r"|vcd|video_ts|win32"
    # git and its like ask each directory whether it is a repository
    r"|branches|cvs|debian|fetch_head|head|hooks|info|logs|objects|packed-refs|rcs|refs|sccs|worktrees"
    # build tools, languages and editors look upwards from wherever they are
    r"|bin|brewfile|build|cmakelists|cscope|dist|dockerfile|env|gemfile|gnumakefile|gpath|grtags|gtags|include"
    r"|jenkinsfile|justfile|lib|lib64|license|makefile|node_modules|pipfile|procfile|pyvenv|rakefile|readme|sbin"
    r"|site-packages|src|tags|target|tmp|vagrantfile|vendor|venv",
    re.IGNORECASE,
)


class Wish(NamedTuple):
    """A model to be had from the Hub.

    Attributes:
        revision: None for the default branch.
        name: To show it under.
        branches: Where `revision` is a commit: one of these may have moved there, and is then what was asked for.
    """

    repo: str
    revision: str | None
    name: str
    branches: tuple[str, ...] = ()


def may_be_namespace(name: str) -> bool:
    """Whether `name/…` may be somebody's models."""
    return _NAMESPACE.fullmatch(name) is not None and "--" not in name and not _PROBED.fullmatch(name)


def wish_for(namespace: str, name: str) -> Wish | None:
    """The model that `namespace/name` or `namespace/name@revision` stands for."""
    repo, at, revision = name.partition("@")
    if not may_be_namespace(namespace) or not _may_be_name(repo) or (at and not is_revision(revision)):
        return None
    return Wish(f"{namespace}/{repo}", revision if at else None, f"{namespace}/{name}")


def is_repo(text: str) -> bool:
    """The Hub's grammar of `org/name`, and of the old `name`."""
    return _REPO.fullmatch(text) is not None and "--" not in text and ".." not in text


def is_commit(text: str) -> bool:
    return _COMMIT.fullmatch(text) is not None


def is_revision(text: str) -> bool:
    """A branch, tag or commit that can be one component of a path, and is not a file that is being written."""
    return _REVISION.fullmatch(text) is not None and ".." not in text and not _FILES.fullmatch(text)


def _may_be_name(text: str) -> bool:
    return is_repo(text) and not _PROBED.fullmatch(text) and not _FILES.fullmatch(text)
