"""`cakefs merge`: models stacked, repeated or averaged as a recipe says."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cakefs.cli.options import config_of
from cakefs.cli.out import Out
from cakefs.cli.slice import add_view_options, say_made
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.plan.recipe import Recipe

HELP = "stack, repeat or average layers of models as a model of their own"
EPILOG = """\
Nothing is fetched: the merge is a header and a config, and its tensors are those of the models, or calculated from them
when they are read.

  cakefs merge recipe.yml --as stack
  cakefs merge org/name --repeat-map 0,1,2,1,2,3 --as longer
  cakefs merge org/name --ratio-repeat '0:.3,.2:.4,.4:1' --as longer      shares of the depth, gaps filled

Recipes are those of mergekit (passthrough, linear, task_arithmetic), with models named as `cakefs ls` shows them;
or say `model`, and `ratio_repeat` or `repeat_map_raw`.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("recipe", metavar="RECIPE.yml|MODEL", help="a recipe, or the model whose layers repeat")
    repeat = parser.add_mutually_exclusive_group()
    repeat.add_argument("--repeat-map", metavar="L,L,...", help="the layers in order, such as 0,1,2,1,2,3")
    repeat.add_argument("--ratio-repeat", metavar="S:E,...", help="parts of the depth in order, 0 to 1")
    parser.add_argument(
        "--mode", choices=("readme", "david-code"), help="how --ratio-repeat rounds: as documented, or as shipped"
    )
    add_view_options(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.known import survey
    from cakefs.engine.models import views

    recipe = _recipe(args)
    with survey.open_store(config_of(args).store) as store:
        made = views.merge_models(store, recipe, args.name, prefix=args.prefix, update=args.update)
    say_made(made, args.json, out)
    return 0


def _recipe(args: argparse.Namespace) -> "Recipe":
    from cakefs.engine.models.views import read_recipe
    from cakefs.plan.ratio import Mode, parse_map, parse_ratios
    from cakefs.plan.recipe import ModelRef, Repeat

    if args.mode and args.ratio_repeat is None:
        raise UserError("--mode says how --ratio-repeat rounds", hint="in a recipe: `mode: david-code`")
    model = ModelRef(args.recipe, "MODEL")
    if args.repeat_map is not None:
        return Repeat(model, layers=parse_map(args.repeat_map))
    if args.ratio_repeat is not None:
        return Repeat(model, ratios=parse_ratios(args.ratio_repeat), mode=Mode(args.mode or "readme"))
    return read_recipe(Path(args.recipe))
