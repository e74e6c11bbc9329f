"""`cakefs doctor`: the checks of `doctor.diagnose`, written as they come."""

import argparse

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out

HELP = "check what a working mount needs, and name each fix"
WORDS = {True: "ok", False: "FAILED", None: "note"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit code 1 when a check failed."
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from dataclasses import asdict

    from cakefs.cli.doctor import diagnose

    config = config_of(args)
    checks = []
    for check in diagnose(config, has_token=_has_token()):
        checks.append(check)
        if args.json:
            continue
        if not out.quiet:
            out.line(f"{WORDS[check.ok]:<6}  {check.name}: {check.detail}")
            if check.fix:
                out.line(f"        fix: {check.fix}")
        elif check.ok is False:
            out.line(check.name)
    if args.json:
        out.json([asdict(check) for check in checks])
    return int(any(check.ok is False for check in checks))


def _has_token() -> bool:
    """False also where the libraries are broken, which a check of its own says."""
    try:
        from cakefs.app import hub_token

        return hub_token() is not None
    except ImportError:
        return False
