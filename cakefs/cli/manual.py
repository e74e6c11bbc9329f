"""The manual, out of what the code itself says: the parser its commands, `Config` its settings, the errors their codes.

One source, three forms: `cakefs help TOPIC`, the man page, and the table of commands in README.md (`scripts/manual`
writes it there, a test holds it to this).
"""

import argparse
import re
from collections.abc import Callable, Iterable
from inspect import getdoc

from cakefs import __version__, errors
from cakefs.errors import CakeError

GLOBAL = {"--help", "--store", "--endpoint", "--offline", "--quiet", "--debug"}
ENVIRONMENT = {
    "CAKEFS_STORE": "the store (default: cakefs in $XDG_DATA_HOME)",
    "CAKEFS_CONFIG": "the config file (default: cakefs/config.toml in $XDG_CONFIG_HOME)",
    "HF_ENDPOINT": "the Hub",
    "HF_TOKEN": "the Hub's token; else the token file of `hf auth login`",
    "HF_HUB_OFFLINE": "1: never ask the network",
    "HF_HUB_CACHE": "the cache of huggingface_hub (default: hub in $HF_HOME)",
    "OLLAMA_MODELS": "the models of Ollama (default: ~/.ollama/models, then those of its system service)",
    "HTTPS_PROXY": "a proxy, http://host:port or socks5://host:port; with HTTP_PROXY, ALL_PROXY and NO_PROXY",
    "SSL_CERT_FILE": "certificates to trust; or SSL_CERT_DIR, a directory of them",
    "NO_COLOR": "no colours",
}
FURTHER_CODES = {
    0: "success",
    1: "any other failure; `doctor` found a fault, `service status` that it does not run",
    70: "a bug in cakefs: --debug shows the traceback",
    130: "Ctrl-C",
}


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, in the order of `cakefs --help`."""
    from cakefs.cli.main import build_parser

    (tree,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(tree.choices)


def topics() -> dict[str, tuple[str, Callable[[], str]]]:
    """What `help` explains beside the commands: a line about it, and its text."""
    return {
        "settings": ("the config file and the environment", settings),
        "exit-codes": ("what a command ends with", exit_codes),
        "status.json": ("the counters of a mount, their names and meaning", status_keys),
    }


def settings() -> str:
    from cakefs.config import Config

    fields = re.findall(r"^(\w+): (.*)$", getdoc(Config) or "", re.MULTILINE)
    assert {name for name, _ in fields} >= set(Config.__struct_fields__), "each setting has its line"
    return (
        "Flags win over the environment, the environment over the config file.\n\n"
        f"Environment:\n{_listed(ENVIRONMENT.items())}\n\nKeys of the config file, which is TOML:\n{_listed(fields)}\n"
    )


def exit_codes() -> str:
    meanings = dict(re.findall(r"── (\w+) +(.*)", errors.__doc__ or ""))
    kinds = {n: k for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, CakeError)}
    codes = {kind.exit_code: meanings[name] for name, kind in kinds.items() if kind is not CakeError}
    return _listed((str(code), text) for code, text in sorted({**codes, **FURTHER_CODES}.items())) + "\n"


def status_keys() -> str:
    from cakefs.engine.serve.metrics import KEYS

    return (
        ".cakefs/status.json below the mount, and `cakefs status --json`. Sizes in bytes, times in seconds; counters\n"
        "begin with the mount. `cakefs mount --metrics` has them for Prometheus as cakefs_KEY, a dot\n"
        "as an underscore, counters with _total behind.\n\n"
        f"{_listed((key, meaning) for key, (_, meaning) in KEYS.items())}\n"
    )


def _listed(entries: Iterable[tuple[str, str]]) -> str:
    rows = list(entries)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def readme_table() -> str:
    """The rows of README's section Commands."""
    rows = [f"| `{_usage(name, p)}` | {_sentence(p)} |" for name, p in commands().items()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    words = [_word(a).replace("|", "\\|") for a in _positionals(parser)]
    return " ".join(["cakefs", name, *words])


def _word(action: argparse.Action) -> str:
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    name += "…" if action.nargs in ("*", "+") else ""
    return f"[{name}]" if action.nargs in ("?", "*") else name


def _sentence(parser: argparse.ArgumentParser) -> str:
    text = _purpose(parser)[:1].lower() + _purpose(parser)[1:]
    flags = [_flag(a) for a in _options(parser) if "--json" not in a.option_strings]
    choices = [f"`{c}`" for a in _positionals(parser) if a.choices for c in a.choices]
    return "; ".join([text, *filter(None, [", ".join(choices), ", ".join(f"`{f}`" for f in flags)])]).replace(
        "|", "\\|"
    )


def _purpose(parser: argparse.ArgumentParser) -> str:
    return (parser.description or "").rstrip(".")


def _flag(action: argparse.Action) -> str:
    long = next(o for o in action.option_strings if o.startswith("--"))
    return f"{long} {_value(action)}".rstrip()


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices and not action.metavar:
        return "|".join(map(str, action.choices))
    return action.metavar if isinstance(action.metavar, str) else action.dest.upper()


def _positionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in parser._actions if not a.option_strings]


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Those of the command itself, without the hidden ones and those of every command."""
    shown = [a for a in parser._actions if a.option_strings and a.help != argparse.SUPPRESS]
    return [a for a in shown if not GLOBAL & set(a.option_strings)]


def man_page() -> str:
    """cakefs(1), in the language of man."""
    from cakefs.cli.main import build_parser

    top = build_parser()
    lines = [f'.TH CAKEFS 1 "" "cakefs {__version__}"', ".SH NAME", r"cakefs \- ML models as ordinary directories"]
    lines += [".SH SYNOPSIS", r".B cakefs", r".I COMMAND", "[options]", ".SH DESCRIPTION", _roff(top.description or "")]
    lines += [".SH COMMANDS"]
    for name, parser in commands().items():
        lines += [".SS " + _roff(_usage(name, parser).replace("\\|", "|")), _roff(_purpose(parser) + ".")]
        for action in [a for a in (*_positionals(parser), *_options(parser)) if a.help]:
            lines += [".TP", f".B {_roff(_flag(action) if action.option_strings else _word(action))}"]
            lines += [_roff(action.help or "")]
        lines += _verbatim(parser.epilog or "")
    lines += [".SH OPTIONS OF EVERY COMMAND"]
    for action in [a for a in top._actions if GLOBAL & set(a.option_strings)]:
        lines += [".TP", f".B {_roff(_flag(action))}", _roff(action.help or "")]
    for title, text in (("SETTINGS", settings()), ("EXIT STATUS", exit_codes()), ("STATUS.JSON", status_keys())):
        lines += [f".SH {title}", *_verbatim(text)]
    return "\n".join(lines) + "\n"


def _verbatim(text: str) -> list[str]:
    """Lines as they are, below each other."""
    return [".PP", ".nf", *(_roff(line) for line in text.rstrip("\n").split("\n")), ".fi"] if text.strip() else []


def _roff(text: str) -> str:
    text = (
        text.replace("\\", r"\e").replace("-", r"\-").replace("`", r"\(ga").replace("'", r"\(aq").replace("^", r"\(ha")
    )
    text = text.replace("~", r"\(ti").replace("%%", "%")
    return rf"\&{text}" if text.startswith(".") else text
