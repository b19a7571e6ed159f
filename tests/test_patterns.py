"""Patterns: what is parsed, and that every mask is the best one its pattern allows."""

from __future__ import annotations

import dataclasses
import itertools
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from llmprune.errors import UserError
from llmprune.patterns import NM, Pattern, Scope, Unstructured, _first_in_order, parse

NMS = [(1, 2), (2, 4), (1, 4), (3, 4), (1, 3), (2, 5), (4, 8), (2, 8), (7, 8), (6, 12), (8, 16)]
FRACTIONS = [0.05, 0.25, 0.29, 0.5, 0.58, 0.7, 0.99]


def scores(*shape: int, seed: int = 0) -> Tensor:
    """Positive and all different."""
    numbers = torch.randperm(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(seed))
    return (numbers + 1.0).reshape(shape)


def tied(*shape: int, seed: int = 0) -> Tensor:
    """Many of them equal."""
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def pruned_by_hand(flat: list[float], count: int) -> set[int]:
    """Places of the `count` lowest, the earlier ones among equals."""
    return set(sorted(range(len(flat)), key=lambda place: (flat[place], place))[:count])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", NM(2, 4)),
        ("1:4", NM(1, 4)),
        ("4:8", NM(4, 8)),
        ("16:32", NM(16, 32)),
        (" 2:4 ", NM(2, 4)),
        (0.5, Unstructured(0.5)),
        ("0.5", Unstructured(0.5)),
        (".5", Unstructured(0.5)),
        ("50%", Unstructured(0.5)),
        ("50.0%", Unstructured(0.5)),
        ("2.5%", Unstructured(0.025)),
        (0.29, Unstructured(0.29)),
        ("0.29", Unstructured(0.29)),
    ],
)
def test_parses(text: str | float, expected: Pattern) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_scope_goes_to_unstructured_patterns(scope: str) -> None:
    assert parse("29%", scope) == Unstructured(0.29, scope)
    assert parse("29%", scope).row_independent == (scope == "row")


@pytest.mark.parametrize("pattern", [NM(1, 4), Unstructured(0.3, "matrix")])
def test_a_pattern_is_returned_unchanged(pattern: Pattern) -> None:
    assert parse(pattern) is pattern


@pytest.mark.parametrize("text", ["2:4", "1:4", "16:32", "50%", "29%", "62.5%"])
def test_text_round_trip(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "0:0", "4:2"])
def test_n_and_m_must_make_sense(text: str) -> None:
    with pytest.raises(UserError, match=rf"^sparsity {text}: N:M keeps at most N of every M weights, so 0 < N < M"):
        parse(text)


@pytest.mark.parametrize("text", ["", "half", "2:4:8", "2/4", "-1:4", "2:", ":4", "50%%", "%", "1.5:4", "two:four"])
def test_what_is_no_pattern_is_not_understood(text: str) -> None:
    with pytest.raises(UserError, match=r"is not understood: write 2:4, 4:8, 0\.5 or 50%") as caught:
        parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", [0, 1, 0.0, 1.0, -0.5, "0%", "100%", "150%", "-5%", "nan", "inf", "1e9", 200])
def test_fractions_lie_between_0_and_1(text: str | float) -> None:
    with pytest.raises(UserError, match="must lie between 0 and 1, or 0% and 100%") as caught:
        parse(text)
    assert repr(str(text)) in str(caught.value)


@pytest.mark.parametrize("text", ["50", 50, "62.5", "1.5"])
def test_a_forgotten_percent_sign_is_suggested(text: str | float) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert f"(did you mean {text}%?)" in str(caught.value)


@pytest.mark.parametrize("text", ["100%", "150%", "100", "0", "-5%", "nan"])
def test_nothing_senseless_is_suggested(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert "did you mean" not in str(caught.value)


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(UserError, match="scope 'column' is not one of row, matrix"):
        parse("50%", "column")  # type: ignore[arg-type]


def test_sparsity_is_the_fraction_of_zeros() -> None:
    assert NM(1, 4).sparsity == 0.75
    assert NM(2, 4).sparsity == NM(4, 8).sparsity == Unstructured(0.5).sparsity == 0.5
    assert (NM(3, 8).group, Unstructured(0.5).group) == (8, 1)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
def test_patterns_are_frozen_and_hashable(pattern: Pattern) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.sparsity = 0.1  # type: ignore[misc]
    assert len({pattern, dataclasses.replace(pattern)}) == 1


@pytest.mark.parametrize(("n", "m"), NMS)
def test_nm_keeps_the_best_of_all_masks(n: int, m: int) -> None:
    saliency = scores(3, 2 * m, seed=n)
    mask = NM(n, m).keep(saliency)
    assert mask.dtype == torch.bool
    assert mask.shape == saliency.shape
    for row, kept in zip(saliency.tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), m):
            group = row[start : start + m]
            best = max(
                itertools.combinations(range(m), n), key=lambda places, group=group: sum(group[p] for p in places)
            )
            assert [place for place in range(m) if kept[start + place]] == list(best)


@pytest.mark.parametrize(("n", "m"), NMS)
@pytest.mark.parametrize("make", [scores, tied])
def test_nm_counts_are_exact(make: object, n: int, m: int) -> None:
    mask = NM(n, m).keep(make(5, 6 * m))  # type: ignore[operator]
    assert (mask.reshape(5, 6, m).sum(-1) == n).all()


@pytest.mark.parametrize(("n", "m"), NMS)
def test_nm_keeps_the_earlier_of_equals(n: int, m: int) -> None:
    saliency = tied(6, 4 * m, seed=m)
    mask = NM(n, m).keep(saliency).reshape(-1, m).tolist()
    for group, kept in zip(saliency.reshape(-1, m).tolist(), mask, strict=True):
        expected = set(sorted(range(m), key=lambda place, group=group: (-group[place], place))[:n])
        assert {place for place in range(m) if kept[place]} == expected


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("make", [scores, tied])
def test_row_scope_prunes_the_lowest_of_each_row(make: object, fraction: float) -> None:
    saliency = make(7, 100)  # type: ignore[operator]
    mask = Unstructured(fraction).keep(saliency)
    for row, kept in zip(saliency.tolist(), mask.tolist(), strict=True):
        expected = pruned_by_hand(row, round(fraction * 100))
        assert {place for place in range(100) if not kept[place]} == expected


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("make", [scores, tied])
def test_matrix_scope_prunes_the_lowest_of_all(make: object, fraction: float) -> None:
    saliency = make(10, 30)  # type: ignore[operator]
    kept = Unstructured(fraction, "matrix").keep(saliency)
    assert kept.shape == saliency.shape
    count = round(fraction * 300)
    expected = pruned_by_hand(saliency.flatten().tolist(), count)
    assert {place for place in range(300) if not kept.flatten()[place]} == expected
    for given in (saliency, saliency.T.contiguous().T):  # as a device does that is not to wait
        assert torch.equal(_first_in_order(given, count), ~kept)


@pytest.mark.parametrize(
    ("scope", "groups"), [("row", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]), ("matrix", [[*range(12)]])]
)
def test_unstructured_keeps_the_best_of_all_masks(scope: str, groups: list[list[int]]) -> None:
    saliency = scores(3, 4, seed=3)
    flat = saliency.flatten().tolist()
    kept = Unstructured(0.5, scope).keep(saliency).flatten()
    for group in groups:
        best = max(itertools.combinations(group, len(group) // 2), key=lambda places: sum(flat[p] for p in places))
        assert [place for place in group if kept[place]] == list(best)


@pytest.mark.parametrize(
    ("fraction", "width", "pruned"),
    [
        (0.5, 7, 3),
        (0.29, 100, 29),
        (0.58, 100, 58),
        (0.57, 100, 57),
        (1 / 3, 9, 3),
        (0.1, 9, 0),
        (0.9, 9, 8),
        (0.7, 10, 7),
    ],
)
def test_the_number_of_pruned_weights_is_truncated_but_never_for_float_dust(
    fraction: float, width: int, pruned: int
) -> None:
    assert (~Unstructured(fraction).keep(scores(4, width))).sum(-1).tolist() == [pruned] * 4
    assert int((~Unstructured(fraction, "matrix").keep(scores(1, width))).sum()) == pruned


@pytest.mark.parametrize(
    ("fraction", "width", "pruned"), [(0.5, 7, 4), (0.29, 100, 29), (0.57, 100, 57), (1 / 3, 9, 3), (0.1, 9, 1)]
)
def test_only_a_part_of_a_weight_is_rounded_up(fraction: float, width: int, pruned: int) -> None:
    rule = Unstructured(fraction, up=True)
    weight = scores(4, width) * rule.keep(scores(4, width))
    assert (weight == 0).sum(-1).tolist() == [pruned] * 4
    assert rule.count((4, width)) == 4 * pruned
    assert rule.holds(weight)
    assert str(rule) == str(Unstructured(fraction))


@pytest.mark.parametrize("first", [0, 1, 5, 19, 20])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("up", [False, True])
def test_as_many_zeros_as_can_be_in_some_inputs(first: int, fraction: float, scope: Scope, up: bool) -> None:
    whole = Unstructured(fraction, scope, up)
    here, there = whole.divided(7, 20, first)
    counts = here.count((7, first)), there.count((7, 20 - first))
    assert sum(counts) == whole.count((7, 20))
    assert counts[0] == 7 * first or counts[1] == 0


def blocks(width: int, seed: int, largest: int = 24) -> list[tuple[int, int]]:
    """Start and end of consecutive blocks of random sizes that cover a width."""
    sizes = random.Random(seed)
    ends = [0]
    while ends[-1] < width:
        ends.append(min(width, ends[-1] + sizes.randint(1, largest)))
    return list(itertools.pairwise(ends))


UNEVEN = [0.55, 0.6, 0.7, 1 / 3]


def promised(fraction: float, count: int, up: bool = False) -> int:
    """The zeros among `count` weights, in exact arithmetic."""
    exact = Fraction(fraction).limit_denominator(1000) * count
    assert int(exact) == int(fraction * count + 1e-6)
    return int(exact) + int(up and exact.denominator > 1)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("fraction", UNEVEN)
@pytest.mark.parametrize("make", [scores, tied])
@pytest.mark.parametrize("seed", range(10))
def test_blocks_add_up_to_the_whole(make: object, fraction: float, seed: int, up: bool) -> None:
    """After every block of columns, as many are pruned as the pattern promises for all columns up to there."""
    width = random.Random(seed).randint(2, 200)
    saliency = make(7, width, seed=seed)  # type: ignore[operator]
    for scope in ("row", "matrix"):
        pattern = Unstructured(fraction, scope, up)
        pruned = torch.zeros(7, width, dtype=torch.bool)
        for start, end in blocks(width, seed):
            pruned[:, start:end] = ~pattern.keep(saliency[:, start:end], before=start)
            if scope == "row":
                assert pruned.sum(-1).tolist() == [promised(fraction, end, up)] * 7
            else:
                assert int(pruned.sum()) == promised(fraction, 7 * end, up)
        whole = ~pattern.keep(saliency)
        assert int(pruned.sum()) == int(whole.sum())
        assert pattern.holds((~pruned).float())


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("fraction", UNEVEN)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 128])
@pytest.mark.parametrize("width", [1, 10, 97, 300])
def test_blocks_of_one_size_add_up_to_the_whole(scope: str, fraction: float, size: int, width: int) -> None:
    saliency, pattern = scores(5, width), Unstructured(fraction, scope)
    masks = [pattern.keep(saliency[:, start : start + size], start) for start in range(0, width, size)]
    pruned = ~torch.cat(masks, dim=1)
    if scope == "row":
        assert pruned.sum(-1).tolist() == [promised(fraction, width)] * 5
    else:
        assert int(pruned.sum()) == promised(fraction, 5 * width)


@pytest.mark.parametrize("fraction", UNEVEN)
@pytest.mark.parametrize("make", [scores, tied])
@pytest.mark.parametrize("before", [0, 1, 3, 8, 128, 1001])
def test_the_lowest_of_a_block_are_pruned(make: object, fraction: float, before: int) -> None:
    saliency = make(6, 9, seed=before)  # type: ignore[operator]
    count = promised(fraction, before + 9) - promised(fraction, before)
    for row, kept in zip(saliency.tolist(), Unstructured(fraction).keep(saliency, before).tolist(), strict=True):
        assert {place for place in range(9) if not kept[place]} == pruned_by_hand(row, count)
    count = promised(fraction, 6 * (before + 9)) - promised(fraction, 6 * before)
    kept = Unstructured(fraction, "matrix").keep(saliency, before).flatten()
    expected = pruned_by_hand(saliency.flatten().tolist(), count)
    assert {place for place in range(54) if not kept[place]} == expected


@pytest.mark.parametrize(("n", "m"), NMS)
@pytest.mark.parametrize("make", [scores, tied])
def test_nm_blocks_are_the_whole(make: object, n: int, m: int) -> None:
    saliency = make(5, 6 * m, seed=m)  # type: ignore[operator]
    pattern = NM(n, m)
    for ends in ([0, 6], [0, 1, 2, 3, 4, 5, 6], [0, 2, 5, 6]):
        parts = [
            pattern.keep(saliency[:, first * m : last * m], before=first * m)
            for first, last in itertools.pairwise(ends)
        ]
        assert torch.equal(torch.cat(parts, dim=1), pattern.keep(saliency))


ALL = [NM(2, 4), NM(1, 4), NM(5, 8), Unstructured(0.29), Unstructured(0.5), Unstructured(0.29, "matrix")]


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_masks_do_not_depend_on_dtype_layout_or_run(pattern: Pattern) -> None:
    saliency = tied(8, 16)
    mask = pattern.keep(saliency)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(pattern.keep(saliency.to(dtype)), mask)
    assert torch.equal(pattern.keep(saliency.T.contiguous().T), mask)
    assert torch.equal(pattern.keep(saliency.clone()), mask)


@pytest.mark.parametrize("pattern", ALL, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, float("inf"), 1e-45])
def test_counts_hold_where_everything_is_equal(pattern: Pattern, value: float) -> None:
    mask = pattern.keep(torch.full((4, 200), value))
    assert int((~mask).sum()) == round(pattern.sparsity * 800)


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_infinite_saliency_is_kept(pattern: Pattern) -> None:
    saliency = scores(4, 16)
    saliency[:, ::8] = float("inf")
    assert pattern.keep(saliency)[:, ::8].all()


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_signed_zeros_are_equal(pattern: Pattern) -> None:
    saliency = torch.zeros(4, 16)
    mask = pattern.keep(saliency)
    saliency[:, ::3] = -0.0
    assert torch.equal(pattern.keep(saliency), mask)


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_the_saliency_is_left_as_it_was(pattern: Pattern) -> None:
    saliency = scores(4, 16)
    before = saliency.clone()
    pattern.keep(saliency)
    assert torch.equal(saliency, before)


@pytest.mark.parametrize("pattern", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_holds_for_what_was_pruned_and_not_once_a_zero_is_filled(pattern: Pattern, dtype: torch.dtype) -> None:
    weight = scores(6, 40).to(dtype)
    mask = pattern.keep(weight)
    pruned = weight * mask
    assert not pattern.holds(weight)
    assert pattern.holds(pruned)
    assert pattern.holds(-pruned)
    assert pattern.holds(torch.zeros_like(pruned))
    row, column = (~mask).nonzero()[-1].tolist()
    pruned[row, column] = 1
    assert not pattern.holds(pruned)


def test_zeros_of_one_row_do_not_make_up_for_another() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    assert Unstructured(0.5, "matrix").holds(weight)
    assert not Unstructured(0.5, "row").holds(weight)


def test_zeros_of_one_group_do_not_make_up_for_another() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]])
    assert Unstructured(0.5).holds(weight)
    assert NM(4, 8).holds(weight)
    assert not NM(2, 4).holds(weight)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 8), Unstructured(0.3)], ids=str)
def test_rows_can_be_stacked_where_the_pattern_says_so(pattern: Pattern) -> None:
    first, second = tied(5, 24, seed=1), scores(3, 24, seed=2)
    assert pattern.row_independent
    together = pattern.keep(torch.cat([first, second]))
    assert torch.equal(together, torch.cat([pattern.keep(first), pattern.keep(second)]))
