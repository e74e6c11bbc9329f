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

MODELS = ("MODEL", "A", "B")  # What stands for the name of a model in a command's usage.

# What bash and zsh have in common: `command` is the one on the line, `before` the word before the one to complete,
# `list` what may follow. Names of models are text: no shell may expand them.
CASES = """\
case $command in
{options}
esac
case $command in {with_models})
while IFS= read -r word; do list+=("$word"); done < <(cakefs ls --quiet 2>/dev/null) ;;
esac
case "$command $before" in
{values}
esac
"""
BASH = """\
_cakefs() {{
local line=${{COMP_LINE:0:COMP_POINT}} word command= before=${{COMP_WORDS[COMP_CWORD-1]}} list=({first})
for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
case $word in {commands}) command=$word; break ;; esac
done
{cases}# bash splits names at : and @ too, and replaces only what is behind the last : or begins with the last @.
local typed=${{line##* }} breaks=${{COMP_WORDBREAKS//[!:@=]/}} kept=
[[ -z $breaks ]] || kept=${{typed%"${{typed##*[$breaks]}}"}} kept=${{kept%@}}
COMPREPLY=()
for word in "${{list[@]}}"; do
[[ $word == "$typed"* ]] || continue
printf -v word %q "${{word#"$kept"}}"
COMPREPLY+=("$word")
done
}}
complete -o default -F _cakefs cakefs
"""
ZSH = """\
#compdef cakefs
local word command= before=${{words[CURRENT-1]}}
local -a list=({first})
for word in ${{words[2,CURRENT-1]}}; do
case $word in {commands}) command=$word; break ;; esac
done
{cases}compadd -- $list
[[ -z $command ]] || _files
"""


class Option(NamedTuple):
    """Under all its names, such as `-o` and `--output`; `choices` are the values it may have, where they are fixed."""

    names: list[str]
    help: str
    takes_value: bool
    choices: list[str]


class Words(NamedTuple):
    """What may follow a command: its options, fixed words, and perhaps the name of a model."""

    help: str
    options: list[Option]
    choices: list[str]
    models: bool

    @property
    def first(self) -> str:
        """What may come where no option asks for a value."""
        return " ".join([*self.choices, *(n for o in self.options for n in o.names if n.startswith("--"))])


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace, out: Out) -> int:
    out.script(script(args.shell))
    return 0


def script(shell: str) -> str:
    """The completion script of bash, zsh or fish."""
    from cakefs.cli.main import build_parser

    top = build_parser()
    (tree,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    commands = {name: _words(parser) for name, parser in tree.choices.items()}
    return _fish(commands) if shell == "fish" else _bash_or_zsh(shell, commands, _words(top))


def _words(parser: argparse.ArgumentParser) -> Words:
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS]
    options = [Option([*a.option_strings], a.help or "", a.nargs != 0, _choices(a)) for a in shown if a.option_strings]
    choices = [choice for a in shown if not a.option_strings for choice in _choices(a)]
    return Words(parser.description or "", options, choices, any(a.metavar in MODELS for a in shown))


def _choices(action: argparse.Action) -> list[str]:
    return [str(choice) for choice in action.choices] if isinstance(action.choices, tuple) else []


def _bash_or_zsh(shell: str, commands: Mapping[str, Words], top: Words) -> str:
    values = (
        "|".join(f'"{name} {option}"' for option in o.names) + f") list=({' '.join(o.choices)}) ;;"
        for name, words in commands.items()
        for o in words.options
        if o.takes_value
    )
    return (BASH if shell == "bash" else ZSH).format(
        first=" ".join([*commands, top.first]),
        commands="|".join(commands),
        cases=CASES.format(
            options="\n".join(f"{name}) list=({words.first}) ;;" for name, words in commands.items()),
            with_models="|".join(name for name, words in commands.items() if words.models),
            values="\n".join(values),
        ),
    )


def _fish(commands: Mapping[str, Words]) -> str:
    lines = []
    for name, words in commands.items():
        after = f'complete -c cakefs -n "__fish_seen_subcommand_from {name}"'
        lines.append(f"complete -c cakefs -n __fish_use_subcommand -f -a {name} -d {shlex.quote(words.help)}")
        lines += [f"{after} {_fish_option(option)}" for option in words.options]
        if words.choices:
            lines.append(f"{after} -f -a {shlex.quote(' '.join(words.choices))}")
        if words.models:
            lines.append(f"{after} -f -a '(cakefs ls --quiet 2>/dev/null)'")
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    value = f"-x -a {shlex.quote(' '.join(option.choices))}" if option.choices else "-rF" if option.takes_value else ""
    return " ".join(filter(None, [*names, value, "-d", shlex.quote(option.help)]))
