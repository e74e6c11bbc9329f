"""`cakefs help`: a command or another topic, as the manual page has it."""

import argparse

from cakefs.cli import manual
from cakefs.cli.out import Out
from cakefs.errors import UserError

HELP = "explain a command or a topic: settings, exit-codes, status.json"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "`cakefs help --man > cakefs.1` writes the manual page; `cakefs service install` puts it in its place."
    )
    parser.add_argument("topic", metavar="TOPIC", nargs="?", help="a command, or one of those topics")
    parser.add_argument("--man", action="store_true", help="write all of it as a manual page")


def run(args: argparse.Namespace, out: Out) -> int:
    if args.man and args.topic:
        raise UserError("the manual page is one page for all topics", hint="cakefs help --man")
    out.script(manual.man_page() if args.man else _text(args.topic))
    return 0


def _text(topic: str | None) -> str:
    from cakefs.cli.main import build_parser

    commands, topics = manual.commands(), manual.topics()
    if topic is None:
        listed = "\n".join(f"    {name:<20}{about}" for name, (about, _) in topics.items())
        return f"{build_parser().format_help()}\ntopics of `cakefs help TOPIC`, beside the commands:\n{listed}\n"
    if topic in commands:
        return commands[topic].format_help()
    if topic in topics:
        return topics[topic][1]()
    raise UserError(f"no command or topic {topic!r}", hint=f"a command, or {', '.join(topics)}")
