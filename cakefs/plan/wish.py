"""Which names may be models of the Hub that nobody has added yet. All other names stay on this machine.

The mount sees nothing but lookups, and most of those for unknown names are not a user's: editors look for swap files,
desktops for `autorun.inf` and `DCIM`, git for `HEAD`, Node for `node_modules`, cargo for `rust-toolchain`. So a name
must be a repository's by the Hub's grammar, must not look like a file, and must not be one that programs are known to
look for. A model whose name falls to this can still be added by hand.
"""

import re
from typing import NamedTuple

_WORD = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_REPO = re.compile(rf"(?:{_WORD}/)?{_WORD}", re.ASCII)
_NAMESPACE = re.compile(r"[A-Za-z0-9](?:[\w-]{0,94}\w)?", re.ASCII)  # with a dot it is a file, by far more often
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

_ENDINGS = (
    # of a model's own files, looked for one level too high; and of what is written beside a file
    "bin ckpt gguf h5 jinja json jsonl lock mjs model msgpack npz onnx ot pb pickle pkl pt pth safetensors tflite txt "
    "vocab bak cache incomplete log old orig part patch pid rej save sock sw[a-p] temp tmp "
    # desktops and backups
    "bmp db desktop directory exe bat cmd dll gif icns ico inf ini jpe?g lnk msi pdf png ps1 scr svg tag webp "
    # archives and images
    "7z apk bz2 deb dmg gz img iso jar rar rpm tar tgz whl xz zip zst "
    # shells and settings
    "awk bash cfg cnf conf config csh csv dtd env fish hocon ipynb jsonc json5 ksh md pem plist properties props rst "
    "rules service sh sql sqlite3? sum toml tsv xml xsd ya?ml zsh zwc "
    # languages, their build tools and their editors' projects
    "a ac am asm bazel boot build bzl cabal cc cfm class cljs? cljc cmake coffee cs csproj css cxx d dart def dylib "
    "edn el elc elm erl exs? f90 fsproj gch gemspec git go gradle gradlew groovy gyp h hcl hh hpp hrl hs html? hxx "
    "iml in inc java jl js jsx kdev4 kts? la less lhs lib lua m4 mak mill mk ml mli mod mts nim nimble ninja nix o "
    "obj opam out php pl pm proj project proto psgi pxd py pyc pyd pyi pyx qbs rb rkt ron rs ru s sass sbt scala scss "
    "sdl sln so sublime-project svelte swift targets tcl tex tfstate tfvars ts tsx vb vcxproj vim vue wasm work "
    "xcodeproj zig zon"
)
_FILES = re.compile(rf".*\.({'|'.join(_ENDINGS.split())})", re.IGNORECASE | re.DOTALL)
# Without an ending. They are looked for upwards from wherever a program runs, so in each namespace and beside it.
_PROBES = (
    # desktops look at the top of a volume to tell what it is
    "audio_ts autorun bdmv cdplus certificate dcim desktop mpeg2 mpegav pnambic private recycler rr_moved svcd trash "
    "vcd video_ts win32 "
    # git and its like ask each directory whether it is a repository, editors and prompts ask for all of them
    "branches checkouts commondir config cvs cvsroot description dumb-http fetch_head gitdir head hooks index info "
    "logs mcvs merge_head modules objects orig_head packed-refs p4config rcs rebase-apply rebase-merge refs sccs "
    "sequencer shallow svn worktrees "
    # make and its successors
    "bsdmakefile buck build buildfile cmake cmakefiles cmakelists configure conanfile dune dune-project "
    "dune-workspace earthfile gnumakefile jamfile jamroot jbuild justfile kbuild kconfig magefile makefile maskfile "
    "meson module ninja pants premake rakefile sconscript sconstruct snakefile taskfile tupfile waf workspace wscript "
    "xmake "
    # machines and services
    "appfile brewfile caddyfile capfile containerfile dockerfile fastfile jenkinsfile matchfile procfile puppetfile "
    "snapfile tiltfile vagrantfile "
    # languages, their packages and their toolchains
    "artisan berksfile build-aux cargo cartfile cask conda-meta copying cpanfile dangerfile debian eask eldev "
    "elm-stuff gemfile gradle gradlew guardfile jspm_packages license mvnw node_modules bower_components opam pipfile "
    "podfile pylintrc pyenv python-version pyvenv readme ruby-version rustc rust-toolchain site-packages "
    "system-site-packages thorfile tool-versions vendor venv virtualenv "
    # indexes of editors, and what belongs to any directory tree
    "cscope ctags doxyfile editorconfig exrc gpath grtags gtags install tags bin dist env etc include lib lib32 lib64 "
    "libexec out sbin src target tmp "
    # vim tries whether it can write with numbers from 4913 up; others make names of this kind
    r"\d+ tmp[\w.-]+ s\..+"
)
_PROBED = re.compile("|".join(_PROBES.split()), re.IGNORECASE)


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
