"""`cakefs completion`: a script that teaches a shell the commands, their options, and the names of the models here."""

import argparse
import shlex
from collections.abc import Mapping
from typing import NamedTuple

from cakefs.cli.out import Out

HELP = "print a completion script for bash, zsh or fish"
EPILOG = """\
  cakefs completion bash > ~/.local/share/bash-completion/completions/cakefs
  cakefs completion zsh > DIR/_cakefs            DIR is one of $fpath
  cakefs completion fish > ~/.config/fish/completions/cakefs.fish
"""

# What bash and zsh have in common: `command` is the one on the line, `list` the words that may follow.
CASES = """\
case $command in
{options}
esac
case $command in {with_models}) list+=" $(cakefs ls --quiet 2>/dev/null)" ;; esac
"""
BASH = """\
_cakefs() {{
local word command= list="{first}"
for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
case $word in {commands}) command=$word; break ;; esac
done
{cases}COMPREPLY=($(compgen -W "$list" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _cakefs cakefs
"""
ZSH = """\
#compdef cakefs
local word command= list="{first}"
for word in ${{words[2,CURRENT-1]}}; do
case $word in {commands}) command=$word; break ;; esac
done
{cases}compadd -- ${{=list}}
[[ -z $command ]] || _files
"""


class Words(NamedTuple):
    """What may follow a command: its options with their help, and perhaps the name of a model."""

    help: str
    options: dict[str, str]
    models: bool


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.cli.main import build_parser

    top = build_parser()
    (tree,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    commands = {name: _words(parser) for name, parser in tree.choices.items()}
    out.script(_fish(commands) if args.shell == "fish" else _bash_or_zsh(args.shell, commands, _words(top)))
    return 0


def _words(parser: argparse.ArgumentParser) -> Words:
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS]
    options = {o: a.help or "" for a in shown for o in a.option_strings if o.startswith("--")}
    return Words(parser.description or "", options, any(a.metavar == "MODEL" for a in shown))


def _bash_or_zsh(shell: str, commands: Mapping[str, Words], top: Words) -> str:
    options = "\n".join(f'{name}) list="{" ".join(words.options)}" ;;' for name, words in commands.items())
    with_models = "|".join(name for name, words in commands.items() if words.models)
    return (BASH if shell == "bash" else ZSH).format(
        first=" ".join([*commands, *top.options]),
        commands="|".join(commands),
        cases=CASES.format(options=options, with_models=with_models),
    )


def _fish(commands: Mapping[str, Words]) -> str:
    lines = []
    for name, words in commands.items():
        after = f'-n "__fish_seen_subcommand_from {name}"'
        lines.append(f"complete -c cakefs -n __fish_use_subcommand -f -a {name} -d {shlex.quote(words.help)}")
        lines += [f"complete -c cakefs {after} -l {o[2:]} -d {shlex.quote(h)}" for o, h in words.options.items()]
        if words.models:
            lines.append(f"complete -c cakefs {after} -f -a '(cakefs ls --quiet 2>/dev/null)'")
    return "\n".join(lines) + "\n"
