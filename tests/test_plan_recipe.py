"""Recipe texts: both forms, and every refusal by its path."""

from decimal import Decimal
from itertools import pairwise

import pytest

from cakefs.errors import UserError
from cakefs.plan.ratio import Mode
from cakefs.plan.recipe import ModelRef, Repeat, Stack, parse_recipe, referenced
from cakefs.plan.settings import resolve

SLICES = """\
slices:
- sources:
  - model: org/a
    layer_range: [0, 6]
- sources:
  - model: org/b@main
    layer_range: [3, 10]
"""


def stack(text: str) -> Stack:
    recipe = parse_recipe(text)
    assert isinstance(recipe, Stack)
    return recipe


def repeat(text: str) -> Repeat:
    recipe = parse_recipe(text)
    assert isinstance(recipe, Repeat)
    return recipe


def test_our_form() -> None:
    recipe = repeat("model: org/a\nratio_repeat: '0:.29,.2:1'\n")
    assert recipe.model.name == "org/a" and recipe.mode is Mode.README
    assert recipe.ratios[0][:2] == (Decimal(0), Decimal("0.29"))
    listed = repeat("model: org/a\nratio_repeat: [[0, .29], '.2:1']\nmode: david-code\n")
    assert [r[:2] for r in listed.ratios] == [r[:2] for r in recipe.ratios]
    assert listed.mode is Mode.DAVID_CODE
    assert repeat("model: org/a\nrepeat_map_raw: [0, 1, 2, 1]\n").layers == (0, 1, 2, 1)
    assert repeat("model: org/a\nrepeat_map_raw: 0,1,2,1\n").layers == (0, 1, 2, 1)


def test_a_raw_map_wins_and_says_so() -> None:
    recipe = repeat("model: a\nrepeat_map_raw: [0]\nratio_repeat: [[0, 1]]\n")
    assert recipe.layers == (0,) and "no effect" in recipe.warnings[0]


def test_mergekit_slices() -> None:
    recipe = stack("merge_method: passthrough\ndtype: torch.bfloat16\nout_dtype: float16\n" + SLICES)
    assert (recipe.method, recipe.dtype, recipe.out_dtype) == ("passthrough", "BF16", "F16")
    second = recipe.slices[1].sources[0]
    assert (second.model, second.start, second.stop) == (ModelRef("org/b@main", "slices[1].sources[0].model"), 3, 10)
    assert [ref.name for ref in referenced(recipe)] == ["org/a", "org/b@main"]


def test_models_form_adds_the_base() -> None:
    recipe = stack("merge_method: task_arithmetic\nbase_model: b\nmodels:\n- model: a\n  parameters: {weight: 1}\n")
    assert [s.model.name for s in recipe.slices[0].sources] == ["a", "b"]
    assert recipe.slices[0].sources[0].stop is None
    assert [ref.name for ref in referenced(recipe)] == ["a", "b"]


def test_a_model_may_be_spelt_out() -> None:
    recipe = stack("merge_method: passthrough\nmodels:\n- model: {model: {path: org/a, revision: abc}}\n")
    assert recipe.slices[0].sources[0].model.name == "org/a@abc"


def test_idle_parameters_are_told() -> None:
    recipe = stack(
        "merge_method: task_arithmetic\nbase_model: b\nparameters: {int8_mask: true}\n"
        "models:\n- model: a\n  parameters: {weight: 1, density: .5}\n"
    )
    assert recipe.warnings == (
        "parameters.int8_mask: has no effect in task_arithmetic",
        "models[0].parameters.density: has no effect in task_arithmetic",
    )


def test_anchors_and_merge_keys() -> None:
    text = "merge_method: linear\nmodels:\n- &a {model: a, parameters: {weight: 1}}\n- {<<: *a, model: b}\n"
    assert [s.settings["weight"][0].values for s in stack(text).slices[0].sources] == [(1.0,), (1.0,)]


SETTING = """\
merge_method: passthrough
slices:
- sources:
  - model: a
    layer_range: [0, 5]
    parameters:
      scale:
      - filter: o_proj
        value: [0, 1, 0.5]
      - filter: "*"
        value: 2
- sources:
  - model: a
    layer_range: [0, 5]
    parameters: {scale: {filter: o_proj, value: 7}}
  parameters: {scale: 1e-1}
parameters: {scale: 3}
"""


@pytest.mark.parametrize(
    ("part", "tensor", "t", "expected"),
    [
        (0, "x.o_proj.weight", 0.0, 0.0),
        (0, "x.o_proj.weight", 0.25, 0.5),
        (0, "x.o_proj.weight", 0.75, 0.75),
        (0, "x.o_proj.weight", 1.0, 0.5),
        (0, "x.q_proj.weight", 0.5, 2.0),
        (1, "x.o_proj.weight", 0.5, 7.0),
        (1, "x.q_proj.weight", 0.5, 0.1),  # its own filter does not match, so the slice is asked
    ],
)
def test_gradients_and_filters(part: int, tensor: str, t: float, expected: float) -> None:
    recipe = stack(SETTING)
    chosen = recipe.slices[part]
    scopes = (chosen.sources[0].settings, chosen.settings, recipe.settings)
    assert resolve("scale", scopes, tensor, t) == expected


def test_a_switch_steps() -> None:
    recipe = stack("merge_method: linear\nparameters: {normalize: [true, false]}\nmodels: [{model: a}]\n")
    values = [resolve("normalize", [recipe.settings], "x", t, switch=True) for t in (0, 0.9, 1)]
    assert values == [1.0, 1.0, 0.0]


def bad(text: str) -> UserError:
    with pytest.raises(UserError) as caught:
        parse_recipe(text)
    assert "\n" not in caught.value.message
    return caught.value


P = "merge_method: passthrough\n"
RANGE = P + "slices: [{sources: [{model: a, layer_range: %s}]}]\n"
L = "merge_method: linear\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # our form
        ("model: a\nrepeat_map_raw: [0, -1]\n", "repeat_map_raw[1]: -1 is negative"),
        ("model: a\nrepeat_map_raw: []\n", "repeat_map_raw is empty"),
        ("model: a\nrepeat_map_raw: [0, '3']\n", "repeat_map_raw[1]: '3' is not a whole number"),
        ("model: a\nrepeat_map_raw: '3'\n", "repeat_map_raw: '3' is not a list of layer numbers"),
        ("model: a\nratio_repeat: [[0.5]]\n", "ratio_repeat[0]: [0.5] is not a pair"),
        ("model: a\nrepeat_map_raw: [0, 2.5]\n", "repeat_map_raw[1]: 2.5 is not a whole number"),
        ("model: a\nrepeat_map_raw: [0, true]\n", "repeat_map_raw[1]: True is not a whole number"),
        ("model: a\nrepeat_map_raw: [0, 010]\n", "repeat_map_raw[1]: '010' is not a whole number"),
        ("model: a\nratio_repeat: [[0, 1.2]]\n", "ratio_repeat[0]: 1.2 is not within 0 and 1"),
        ("model: a\nratio_repeat: [[.5, .2]]\n", "ratio_repeat[0]: starts at 0.5, after its end 0.2"),
        ("model: a\nratio_repeat: [[0, .nan]]\n", "ratio_repeat[0]: NaN is not a number"),
        ("model: a\nratio_repeat: [[0, .inf]]\nmode: david-code\n", "ratio_repeat[0]: Infinity is not a number"),
        ("model: a\nratio_repeat: [[0, '1']]\n", "ratio_repeat[0][1]: '1' is not a number"),
        ("model: a\nratio_repeat: [[0, 1, 2]]\n", "ratio_repeat[0]: [0, 1, 2] is not a pair"),
        ("model: a\nratio_repeat: []\n", "ratio_repeat is empty"),
        ("model: a\nratio_repeat: 3\n", "ratio_repeat: 3 is not a list"),
        ("model: a\n", "neither ratio_repeat nor repeat_map_raw"),
        ("ratio_repeat: '0:1'\n", "model: missing"),
        ("model: a\nratio_repat: '0:1'\n", "ratio_repat: unknown key"),
        ("model: a\nratio_repeat: '0:1'\nmode: david\n", "mode: 'david' is unknown"),
        # the text
        ("", "not a mapping"),
        ("- a\n", "not a mapping"),
        ("a: [", "line 1"),
        (P + P + SLICES, "line 2, column 1: 'merge_method' is there twice"),
        ("merge_methd: passthrough\n", "merge_methd: unknown key"),
        # the frame
        ("merge_method: slerp\n" + SLICES, "merge_method: slerp cannot be calculated on read"),
        ("merge_method: [passthrough]\n" + SLICES, "merge_method: ['passthrough'] is unknown"),
        ("merge_method: passthru\n" + SLICES, "merge_method: 'passthru' is unknown"),
        (P + "slice: []\n" + SLICES, "slice: unknown key"),
        (P, "neither slices nor models"),
        (P + SLICES + "models: [{model: a}]\n", "both slices and models"),
        (P + "modules: {default: {}}\n", "modules: not supported"),
        (P + "tokenizer_source: union\n" + SLICES, "tokenizer_source: not supported"),
        (P + "tokenizer: {source: base}\n" + SLICES, "tokenizer: not supported"),
        (P + "dtype: int64\n" + SLICES, "dtype: 'int64' is not supported"),
        (P + "out_dtype: bf16\n" + SLICES, "out_dtype: 'bf16' is not supported"),
        (P + "slices: []\n", "slices is empty"),
        (P + "slices: 3\n", "slices: 3 is not a list"),
        (P + "slices: [3]\n", "slices[0]: 3 is not a mapping"),
        (P + "slices: [{}]\n", "slices[0].sources: missing"),
        (P + "slices: [{source: []}]\n", "slices[0].source: unknown key"),
        # a range
        (RANGE % "[6, 2]", "slices[0].sources[0].layer_range: [6, 2] runs backwards"),
        (RANGE % "[2, 2]", "slices[0].sources[0].layer_range: [2, 2] is empty"),
        (RANGE % "[-1, 2]", "slices[0].sources[0].layer_range[0]: -1 is negative"),
        (RANGE % "[0, '3']", "slices[0].sources[0].layer_range[1]: '3' is not a whole number"),
        (RANGE % "[0, 2.5]", "slices[0].sources[0].layer_range[1]: 2.5 is not a whole number"),
        (RANGE % "[0]", "slices[0].sources[0].layer_range: [0] is not"),
        (RANGE % "[]", "slices[0].sources[0].layer_range is empty"),
        (RANGE % "7", "slices[0].sources[0].layer_range: 7 is not a list"),
        (P + "slices: [{sources: [{model: a}]}]\n", "slices[0].sources[0].layer_range: missing"),
        (P + "slices: [{sources: [{model: a, layer_rang: [0, 1]}]}]\n", "slices[0].sources[0].layer_rang: unknown key"),
        (P + "slices: [{sources: [{layer_range: [0, 1]}]}]\n", "slices[0].sources[0].model: missing"),
        (P + "models: [{model: a+lora}]\n", "models[0].model: 'a+lora' applies a LoRA"),
        (P + "models: [{model: {lora: x}}]\n", "models[0].model.lora: unknown key"),
        (P + "models: [{model: a}, {model: b}]\n", "models: passthrough takes one source, not 2"),
        (L + "models: [{model: a}, {model: a}]\n", "models[1]: a is there twice"),
        (
            L + "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]\n",
            "slices[0].sources: ranges of 2 and 3 layers cannot be merged",
        ),
        ("merge_method: task_arithmetic\nmodels: [{model: a}]\n", "base_model: missing"),
        (
            "merge_method: task_arithmetic\nbase_model: b\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
            "slices[0].sources: the base model b is not among them",
        ),
        (P + "slices: [{base_model: a, sources: [{model: a, layer_range: [0, 1]}]}]\n", "slices[0].base_model"),
        # parameters
        (P + "parameters: {scael: 2}\n" + SLICES, "parameters.scael: passthrough has no parameter 'scael'"),
        (P + "models: [{model: a, parameters: {scael: 2}}]\n", "models[0].parameters.scael"),
        (P + "models: [{model: a, parameters: {scale: two}}]\n", "models[0].parameters.scale: 'two' is not a number"),
        (P + "models: [{model: a, parameters: {scale: .nan}}]\n", "models[0].parameters.scale: NaN is not a finite"),
        (P + "models: [{model: a, parameters: {scale: 1e99}}]\n", "models[0].parameters.scale: 1E+99 is not a finite"),
        (P + "models: [{model: a, parameters: {scale: true}}]\n", "models[0].parameters.scale: True is not a number"),
        (P + "models: [{model: a, parameters: {scale: []}}]\n", "models[0].parameters.scale is empty"),
        (
            P + "models: [{model: a, parameters: {scale: [1, x]}}]\n",
            "models[0].parameters.scale[1]: 'x' is not a number",
        ),
        (P + "models: [{model: a, parameters: {scale: [{valu: 1}]}}]\n", "models[0].parameters.scale[0].valu: unknown"),
        (P + "models: [{model: a, parameters: {scale: [{filter: x}]}}]\n", "parameters.scale[0].value: missing"),
        (P + "models: [{model: a, parameters: {scale: {filter: 3, value: 1}}}]\n", "scale.filter: 3 is not text"),
        (P + "models: [{model: a, parameters: 3}]\n", "models[0].parameters: 3 is not a mapping"),
        (L + "models: [{model: a, parameters: {normalize: true}}]\n", "models[0].parameters.normalize: is one for all"),
        (L + "parameters: {normalize: 1}\nmodels: [{model: a}]\n", "parameters.normalize: 1 is neither true nor false"),
        (L + "parameters: {density: 1}\nmodels: [{model: a}]\n", "parameters.density: linear has no parameter"),
    ],
)
def test_every_refusal_names_its_entry(text: str, message: str) -> None:
    assert message in bad(text).message


def test_a_misspelt_key_gets_a_suggestion() -> None:
    assert bad(P + "parameters: {scael: 2}\n" + SLICES).hint == "did you mean scale?"
    assert bad("merge_methd: passthrough\n").hint == "did you mean merge_method?"


def test_nothing_is_built_from_tags() -> None:
    assert "constructor" in bad("model: !!python/object:os.system x\n").message


def test_size_and_depth_are_bounded() -> None:
    assert "more than" in bad("#" * 2_000_000).message
    assert "nested too deep" in bad("a: " + "[" * 5000).message


def test_aliases_of_aliases_take_no_time() -> None:
    lists = "".join(f"- &{c} [{', '.join([f'*{p}'] * 10)}]\n" for p, c in pairwise("abcdefghi"))
    assert "aliases make more than" in bad("model:\n- &a [x]\n" + lists).message
    assert "within itself" in bad("model: &a [*a]\n").message
