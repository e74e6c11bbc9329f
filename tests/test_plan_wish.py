"""Names that may start an add, and those that must not leave the machine."""

import pytest
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from cakefs.plan.wish import Wish, is_commit, is_repo, is_revision, may_be_namespace, wish_for


@pytest.mark.parametrize(
    ("namespace", "name"),
    [
        ("Qwen", "Qwen2.5-0.5B-Instruct"),
        ("01-ai", "Yi-1.5-6B"),
        ("meta-llama", "Llama-3.1-8B"),
        ("TheBloke", "Mistral-7B-v0.1-GGUF"),
        ("some_one", "phi_1.5"),
        ("ggerganov", "whisper.cpp"),
        ("karpathy", "llama2.c"),
        ("internlm", "internlm2-20b"),
        ("bigcode", "starcoder2-3b-v0.1"),
        ("CohereForAI", "aya-23-8B"),
        ("a", "b"),
    ],
)
def test_models_are_wished_for_by_their_names(namespace: str, name: str) -> None:
    assert wish_for(namespace, name) == Wish(f"{namespace}/{name}", None, f"{namespace}/{name}")


@pytest.mark.parametrize("revision", ["main", "v1.0", "step-1000", "0" * 40, "fp16"])
def test_a_revision_behind_the_name_is_part_of_the_wish(revision: str) -> None:
    assert wish_for("org", f"name@{revision}") == Wish("org/name", revision, f"org/name@{revision}")


@pytest.mark.parametrize(
    "path",
    [
        # desktops and file managers
        *("org/.hidden", "org/.directory", "org/.Trash", "org/Thumbs.db", "org/desktop.ini", ".Trash-1000/info"),
        *("autorun.inf/x", "DCIM/Camera", "VIDEO_TS/x", "org/.DS_Store", "org/._name", "lost+found/x"),
        # git, editors, build tools, languages
        *("org/.git", "org/HEAD", "org/objects", "org/refs", ".git/HEAD", "org/name.git", "CVS/Root", "org/.svn"),
        *(
            "node_modules/typescript",
            "org/node_modules",
            "org/package.json",
            "org/.name.swp",
            "org/name.swp",
            "org/4913~",
        ),
        *("org/Makefile", "org/pyproject.toml", "venv/bin", "__pycache__/x", "org/__init__.py", "org/.env"),
        *("org/rust-toolchain", "rust-toolchain/x", "org/Cargo.toml", "org/CMakeFiles", "org/PreLoad.cmake", "cmake/x"),
        *("org/build.ninja", "org/X.java", "org/x.jar", "org/x.c.gch", "org/ctags.d", "org/s.Makefile", "SCCS/s.x"),
        *("org/conda-meta", "org/pyenv", "pyenv/x", "org/conda.bash", "org/WORKSPACE", "org/BUILD.bazel", "org/BUCK"),
        *("org/SConstruct", "org/meson.build", "org/Justfile", "org/dune-project", "org/build.gradle.kts", "org/mvnw"),
        *("org/DESCRIPTION", "org/GTAGS", "org/Session.vim", "org/init.lua", "org/Eask", "org/go.work", "org/x.zwc"),
        *("org/commondir", "org/config", "org/MERGE_HEAD", "org/P4CONFIG", "MCVS/CVS", "org/view.sln"),
        *("org/CACHEDIR.TAG", "org/folder.jpg", "org/4913", "4913/x", "org/tmp.Xa9Qk2", "tmpab12cd_x/x"),
        # files of a model, looked for one level too high
        *("org/config.json", "org/model.safetensors", "org/tokenizer.model", "org/x.gguf", "org/adapter_model.bin"),
        # not of the Hub's grammar
        *(
            "org/-name",
            "org/name-",
            "org/a--b",
            "org/a..b",
            "a--b/name",
            "o.rg/name",
            "org/na me",
            "org/näme",
            "org/a:b",
        ),
        *("org/@main", "org/name@", "org/name@..", "org/name@a b", "org/" + "x" * 97, "org/name@x.lock", "/x", "org/"),
    ],
)
def test_what_programs_look_for_is_no_wish(path: str) -> None:
    namespace, _, name = path.partition("/")
    assert wish_for(namespace, name) is None


def test_one_level_alone_is_never_a_wish() -> None:
    assert wish_for("", "gpt2") is None and wish_for("a/b", "c") is None
    assert may_be_namespace("Qwen") and not may_be_namespace("autorun.inf") and not may_be_namespace("BDMV")


def test_commits_and_revisions() -> None:
    assert is_commit("0123456789abcdef" * 2 + "01234567") and not is_commit("0" * 39) and not is_commit("G" * 40)
    assert is_revision("v1") and not is_revision("main.1a2b3c4d.tmp") and not is_revision("refs/pr/1")


@given(st.text("aZ0-_.@é/ ", max_size=12), st.text("aZ0-_.@é/ ", max_size=12))
def test_every_wish_is_a_name_by_the_hubs_own_rules(namespace: str, name: str) -> None:
    wish = wish_for(namespace, name)
    if wish is not None:
        validate_repo_id(wish.repo)
        assert wish.repo.count("/") == 1 and may_be_namespace(namespace) and is_repo(wish.repo)
