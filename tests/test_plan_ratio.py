"""David's layer orders: README meaning, the shipped function's, and raw maps."""

from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.errors import UserError
from cakefs.plan.ratio import Mode, Ratio, check_map, parse_map, parse_ratios, ratio_layers


def layers(text: str, count: int, mode: Mode = Mode.README) -> list[int]:
    return list(ratio_layers(parse_ratios(text), count, mode))


def test_both_examples_of_the_readme() -> None:
    assert layers("0:.3,.2:.4,.4:.5,.4:1", 10) == [0, 1, 2, 3, 2, 3, 4, 4, 5, 4, 5, 6, 7, 8, 9]
    assert layers("0:0.5,0.3:0.8,0.5:1.0", 7) == [0, 1, 2, 3, 2, 3, 4, 5, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("0:.2,.5:1", 10, list(range(10))),  # a gap between ranges
        ("0:.5", 10, list(range(10))),  # the tail
        (".5:1", 10, list(range(10))),  # before the first
        ("1:1", 10, list(range(10))),  # the last layer
        (".5:1,0:.5", 4, [0, 1, 2, 3, 0, 1, 2, 3]),
        ("0:.5,.2:.3,.6:1", 10, [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7, 8, 9]),  # never skips forwards
        ("0:1", 1, [0]),
        (".29:.55,0:1", 100, [*range(56), *range(100)]),  # 55: doubles would say 56 layers
    ],
)
def test_readme_mode_fills_gaps(text: str, count: int, expected: list[int]) -> None:
    assert layers(text, count) == expected


def test_decimals_are_exact() -> None:
    assert layers("0:1,.29:1", 100)[100] == 29  # floor(.29 * 100) is 28 in doubles
    long = f"0.{'3' * 60}:1"
    assert layers(long, 3) == [0, 1, 2]


@given(
    st.lists(st.tuples(st.decimals(0, 1, places=3), st.decimals(0, 1, places=3)), min_size=1, max_size=6),
    st.integers(1, 150),
)
def test_readme_mode_walks_from_first_to_last_without_a_jump_forwards(
    pairs: list[tuple[Decimal, Decimal]], count: int
) -> None:
    ratios = [Ratio(min(pair), max(pair), "r") for pair in pairs]
    walk = ratio_layers(ratios, count)
    assert walk[0] == 0 and walk[-1] == count - 1
    assert all(b <= a + 1 for a, b in pairwise(walk))


# What the library's function returned for these; 40,000 random lists were compared with it when this was written.
@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("0:.3,.2:.4,.4:.5,.4:1", 10, [0, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9]),
        ("0:.5,.3:.8,.5:1", 7, [0, 1, 2, 3, 2, 3, 4, 5, 3, 4, 5, 6]),
        ("0:.2,.5:1", 10, [0, 1, 5, 6, 7, 8, 9]),  # the gap stays
        ("0:.5", 10, [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]),  # its tail repeats 4 and lacks 9
        (".9:.3,1.2:-1", 10, [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),  # swapped and clamped
        (".25:.5,.1:.2", 12, [0, 1, 2, 3, 4, 5, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (".29:.55", 100, [*range(56), *range(55, 99)]),  # doubles: from 28, to 56
    ],
)
def test_david_code_keeps_its_quirks(text: str, count: int, expected: list[int]) -> None:
    assert layers(text, count, Mode.DAVID_CODE) == expected


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("0:1.2", Mode.README, "ratio_repeat[0]: 1.2 is not within 0 and 1"),
        ("0:1,-.1:1", Mode.README, "ratio_repeat[1]: -0.1 is not within 0 and 1"),
        ("0:.5,.8:.3", Mode.README, "ratio_repeat[1]: starts at 0.8, after its end 0.3"),
        ("0:nan", Mode.README, "ratio_repeat[0]: '0:nan' is not a pair START:END"),
        ("0", Mode.README, "ratio_repeat[0]: '0' is not a pair START:END"),
        ("", Mode.README, "ratio_repeat[0]: '' is not a pair START:END"),
        ("0:.5,", Mode.README, "ratio_repeat[1]: '' is not a pair START:END"),
        ("0:.5:1", Mode.README, "is not a pair"),
        (".5:.5", Mode.DAVID_CODE, "every range is empty"),
        ("1:1", Mode.DAVID_CODE, "every range is empty"),
    ],
)
def test_bad_ratios_are_named(text: str, mode: Mode, message: str) -> None:
    with pytest.raises(UserError) as caught:
        layers(text, 10, mode)
    assert message in caught.value.message


@pytest.mark.parametrize("mode", Mode)
def test_no_mode_takes_nan_or_nothing(mode: Mode) -> None:
    with pytest.raises(UserError, match="NaN is not a number"):
        ratio_layers([Ratio(Decimal(0), Decimal("nan"), "r[0]")], 10, mode)
    with pytest.raises(UserError, match="empty"):
        ratio_layers([], 10, mode)


def test_maps() -> None:
    assert check_map(parse_map("0,1,2,1, 2,3"), 4) == (0, 1, 2, 1, 2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1,4", "repeat_map_raw[2]: layer 4 does not exist"),
        ("0,-1", "repeat_map_raw[1]: layer -1 does not exist"),
        ("", "repeat_map_raw is empty"),
        ("0,,1", "repeat_map_raw[1]: '' is not a layer number"),
        ("0,2.5", "repeat_map_raw[1]: '2.5' is not a layer number"),
        ("a", "repeat_map_raw[0]: 'a' is not a layer number"),
    ],
)
def test_bad_maps_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_map(parse_map(text), 4)
    assert message in caught.value.message


def test_an_output_has_a_limit() -> None:
    with pytest.raises(UserError, match="more than"):
        ratio_layers([Ratio(Decimal(0), Decimal(1), "r")] * 2000, 100)
