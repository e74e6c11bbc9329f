"""`cakefs doctor`: the checks of `doctor.diagnose`, written as they come."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.cli.checks.check import Check

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
    for check in diagnose(config, token=_token()):
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


def _token() -> "Check":
    """Where the libraries are broken, which a check of its own says, no token is found."""
    from cakefs.cli.checks.check import Check
    from cakefs.cli.checks.outside import check_token

    try:
        from cakefs.app import hub_token

        return check_token(hub_token() is not None)
    except ImportError:
        return check_token(False)
    except UserError as error:
        return Check("token", False, error.message, error.hint)
