"""Every method against its published formula, written out anew in plain loops and float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from llmprune import solvers
from llmprune.errors import UserError
from llmprune.patterns import SCOPES, parse
from llmprune.stats import LEVELS, LinearStats

METHODS = ["magnitude", "wanda", "sparsegpt"]

Scores = list[list[float]]


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def correlated(tokens: int, features: int, decay: float = 1.0, seed: int = 0) -> Tensor:
    """Inputs (tokens, features) whose spectrum decays, as those of language models do."""
    random = torch.Generator().manual_seed(seed)
    strength = torch.arange(1, features + 1).float() ** -decay
    basis = torch.linalg.qr(torch.randn(features, features, generator=random))[0]
    x = torch.randn(tokens, features, generator=random) * strength * features**0.5
    return x @ basis * (0.5 + torch.rand(features, generator=random))


def collected(x: Tensor) -> LinearStats:
    stats = LinearStats(x.shape[-1], "gram")
    stats.add(x)
    stats.finish()
    return stats


def relative_error(x: Tensor, dense: Tensor, pruned: Tensor) -> float:
    x, dense, pruned = x.double(), dense.double(), pruned.double()
    return float(((pruned - dense) @ x.T).square().sum() / (dense @ x.T).square().sum())


def solve(
    method: str, weight: Tensor, x: Tensor, sparsity: str | float, scope: str = "row", **options: float
) -> Tensor:
    return solvers.load({"name": method, **options}).solve(weight, collected(x), parse(sparsity, scope))


# The masks of the papers: which places of a table of scores (rows of outputs, columns of inputs) are pruned.


def promised(sparsity: float, count: int) -> int:
    """The zeros among `count` weights, in exact arithmetic: the published rules truncate."""
    return int(Fraction(sparsity).limit_denominator(1000) * count)


def lowest(scores: Scores, sparsity: str | float, scope: str, before: int = 0) -> set[tuple[int, int]]:
    """The pruned places of a table that comes after `before` other columns: their zeros and its own make the total."""
    rows, columns = range(len(scores)), range(len(scores[0]))
    if isinstance(sparsity, str):
        n, m = map(int, sparsity.split(":"))
        groups = [[(row, start + place) for place in range(m)] for row in rows for start in range(0, len(columns), m)]
        pruned = set()
        for group in groups:
            best = sorted(group, key=lambda place: (-scores[place[0]][place[1]], place))[:n]
            pruned |= set(group) - set(best)
        return pruned
    areas, earlier = [[(row, column) for column in columns] for row in rows], before
    if scope == "matrix":
        areas, earlier = [[place for area in areas for place in area]], before * len(rows)
    pruned = set()
    for area in areas:
        count = promised(sparsity, earlier + len(area)) - promised(sparsity, earlier)
        pruned |= set(sorted(area, key=lambda place: (scores[place[0]][place[1]], place))[:count])
    return pruned


def masked(weight: Tensor, pruned: set[tuple[int, int]]) -> Tensor:
    result = weight.clone()
    for row, column in pruned:
        result[row, column] = 0
    return result


def textbook_obs(
    weight: Tensor, x: Tensor, sparsity: str | float, scope: str, block_size: int, damping: float = 0.01
) -> Tensor:
    """Optimal brain surgery with a frozen left side: the inverse of what remains of H is computed anew at each column.

    For column j with C = inv(H[j:, j:]), a pruned weight w_j costs w_j² / C_00, and the columns from j on change by
    -w_j / C_00 · C_0: (arXiv:2301.00774, equations 2 to 4). After each block of columns, the zeros so far are the
    total that the sparsity promises for the columns so far.
    """
    w, h = weight.double().clone(), x.double().T @ x.double()
    live = h.diagonal() > 0
    h += damping * h.diagonal()[live].mean() * torch.eye(len(h))
    w[:, ~live] = 0
    inverses = [torch.linalg.inv(h[column:, column:]) for column in range(len(h))]
    together = int(sparsity.split(":")[1]) if isinstance(sparsity, str) else block_size
    pruned: set[tuple[int, int]] = set()
    for column, inverse in enumerate(inverses):
        if column % together == 0:
            ahead = range(column, min(column + together, len(h)))
            table = [[float(row[place] ** 2 / inverses[place][0, 0]) for place in ahead] for row in w]
            pruned |= {(row, column + place) for row, place in lowest(table, sparsity, scope, before=column)}
        for row in range(len(w)):
            if (row, column) in pruned:
                w[row, column:] -= w[row, column] / inverse[0, 0] * inverse[0]
                w[row, column] = 0
    return w


UNSTRUCTURED = [(0.5, "row"), (0.5, "matrix"), (0.75, "row"), (0.75, "matrix"), (0.25, "matrix")]
UNEVEN = [(share, scope) for share in (0.55, 0.6, 0.7, 1 / 3) for scope in ("row", "matrix")]
"""Their share of a block of 8 columns is no whole number."""
SEMI = [("2:4", "row"), ("4:8", "row"), ("1:4", "row"), ("3:4", "row")]


@pytest.mark.parametrize(("sparsity", "scope"), UNSTRUCTURED + UNEVEN + SEMI)
def test_magnitude_prunes_the_smallest(sparsity: str | float, scope: str) -> None:
    weight = torch.randn(12, 40)
    scores = [[abs(value) for value in row] for row in weight.tolist()]
    expected = masked(weight, lowest(scores, sparsity, scope))
    assert torch.equal(solve("magnitude", weight, torch.zeros(1, 40), sparsity, scope), expected)


@pytest.mark.parametrize(("sparsity", "scope"), UNSTRUCTURED + UNEVEN + SEMI)
def test_wanda_prunes_the_smallest_weight_times_input_norm(sparsity: str | float, scope: str) -> None:
    weight, x = torch.randn(12, 40), correlated(90, 40)
    norms = [math.sqrt(sum(value * value for value in column)) for column in x.T.tolist()]
    scores = [[abs(value) * norm for value, norm in zip(row, norms, strict=True)] for row in weight.tolist()]
    expected = masked(weight, lowest(scores, sparsity, scope))
    result = solve("wanda", weight, x, sparsity, scope)
    assert torch.equal(result, expected)
    assert not torch.equal(result, solve("magnitude", weight, x, sparsity, scope))


@pytest.mark.parametrize("sparsity", [0.5, "2:4", "4:8"])
def test_wanda_keeps_the_best_of_all_masks_of_a_row(sparsity: str | float) -> None:
    """On uncorrelated inputs the kept saliency is what counts: ‖WX‖² = Σ (|W|·‖X‖)²."""
    weight, sizes = torch.randn(4, 8), torch.rand(8) + 0.2
    x = torch.eye(8) * sizes
    result = solve("wanda", weight, x, sparsity)
    group = 4 if sparsity == "2:4" else 8
    halves = [[*itertools.combinations(range(start, start + group), group // 2)] for start in range(0, 8, group)]
    for row, pruned in zip(weight, result, strict=True):
        losses = []
        for choice in itertools.product(*halves):
            kept = torch.zeros(8)
            kept[[place for part in choice for place in part]] = 1
            losses.append((relative_error(x, row[None], (row * kept)[None]), kept))
        best = min(losses, key=lambda loss: loss[0])[1]
        assert torch.equal(pruned, row * best)


def test_wanda_uses_norms_alone() -> None:
    weight, x = torch.randn(6, 16), correlated(50, 16)
    stats = LinearStats(16, "norms")
    stats.add(x)
    stats.finish()
    assert torch.equal(solvers.load("wanda").solve(weight, stats, parse("2:4")), solve("wanda", weight, x, "2:4"))


@pytest.mark.parametrize(
    ("sparsity", "scope"), [*UNSTRUCTURED, *UNEVEN, *SEMI, ("2:5", "row"), ("3:10", "row"), ("5:20", "row")]
)
@pytest.mark.parametrize("tokens", [200, 15])
def test_sparsegpt_is_textbook_optimal_brain_surgery(sparsity: str | float, scope: str, tokens: int) -> None:
    """More tokens than inputs and fewer; N:M groups that divide a block of 8, that do not, and that are larger."""
    weight, x = torch.randn(16, 40), correlated(tokens, 40)
    result = solve("sparsegpt", weight, x, sparsity, scope, block_size=8)
    expected = textbook_obs(weight, x, sparsity, scope, block_size=8)
    same = (result == 0) == (expected == 0)
    assert same.float().mean() >= 0.999
    rows = same.all(-1)
    assert rows.float().mean() >= 0.9
    torch.testing.assert_close(result[rows].double(), expected[rows], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "matrix"), *UNEVEN])
@pytest.mark.parametrize(("features", "block_size"), [(36, 8), (20, 32), (12, 12), (10, 1), (9, 2)])
def test_sparsegpt_with_blocks_that_do_not_fit(features: int, block_size: int, sparsity: float, scope: str) -> None:
    weight, x = torch.randn(16, features), correlated(100, features)
    result = solve("sparsegpt", weight, x, sparsity, scope, block_size=block_size)
    expected = textbook_obs(weight, x, sparsity, scope, block_size=block_size)
    assert torch.equal(result == 0, expected == 0)
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", [0.5, 0.55, 0.6, 0.7])
def test_sparsegpt_at_the_published_block_size(sparsity: float) -> None:
    weight, x = torch.randn(8, 160), correlated(600, 160, decay=0.5)
    result = solve("sparsegpt", weight, x, sparsity, "matrix")
    expected = textbook_obs(weight, x, sparsity, "matrix", block_size=128)
    same = (result == 0) == (expected == 0)
    assert same.float().mean() >= 0.999
    torch.testing.assert_close(result.double()[same], expected[same], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("damping", [0.001, 0.1, 1.0])
def test_sparsegpt_damps_by_a_fraction_of_the_mean_diagonal(damping: float) -> None:
    weight, x = torch.randn(8, 24), correlated(100, 24)
    result = solve("sparsegpt", weight, x, "2:4", damping=damping)
    expected = textbook_obs(weight, x, "2:4", "row", block_size=128, damping=damping)
    assert torch.equal(result == 0, expected == 0)
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "2:5", "1:16"])
def test_block_size_makes_no_difference_for_nm(sparsity: str) -> None:
    weight, x = torch.randn(8, 80), correlated(200, 80)
    first, *others = (solve("sparsegpt", weight, x, sparsity, block_size=size) for size in (1, 8, 30, 128))
    for other in others:
        assert torch.equal(other == 0, first == 0)
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class Single:
    """A pattern that prunes one given input of all, whatever the saliency."""

    column: int
    group = 1
    sparsity = 0.0
    row_independent = True
    scope = "row"

    def keep(self, saliency: Tensor, before: int = 0) -> Tensor:
        places = before + torch.arange(saliency.shape[-1])
        return (places != self.column).expand(saliency.shape)

    def holds(self, weight: Tensor) -> bool:
        return bool((weight[:, self.column] == 0).all())


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("block_size", [1, 2, 4, 6, 128])
def test_one_pruned_weight_leaves_the_least_squares_optimum_to_its_right(column: int, block_size: int) -> None:
    """The columns right of it minimise ‖(Ŵ−W)X‖² + λ‖Ŵ−W‖², solved as an ordinary least-squares problem."""
    weight, x = torch.randn(3, 6), correlated(30, 6)
    solver = solvers.load({"name": "sparsegpt", "block_size": block_size})
    result = solver.solve(weight, collected(x), Single(column))
    damping = 0.01 * x.double().square().sum(0).mean()
    rows = torch.cat([x.double(), damping.sqrt() * torch.eye(6)])
    for dense, pruned in zip(weight.double(), result.double(), strict=True):
        change = torch.linalg.lstsq(rows[:, column + 1 :], rows[:, column] * dense[column]).solution
        expected = torch.cat([dense[:column], torch.zeros(1), dense[column + 1 :] + change])
        torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "row"), (0.5, "matrix"), (0.7, "matrix"), ("2:4", "row")])
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(
    sparsity: str | float, scope: str, seed: int
) -> None:
    weight, x = torch.randn(32, 64), correlated(300, 64, seed=seed) * torch.linspace(0.2, 3, 64)
    error = {name: relative_error(x, weight, solve(name, weight, x, sparsity, scope)) for name in METHODS}
    assert error["sparsegpt"] < 0.8 * error["wanda"]
    assert error["wanda"] < error["magnitude"]


@pytest.mark.parametrize(("sparsity", "scope"), [(0.25, "row"), (0.25, "matrix"), ("3:4", "row")])
def test_weights_left_of_the_first_pruned_one_are_kept_as_they_are(sparsity: str | float, scope: str) -> None:
    weight, x = torch.randn(24, 32), correlated(100, 32)
    result = solve("sparsegpt", weight, x, sparsity, scope, block_size=8)
    changed = 0
    for before, after in zip(weight, result, strict=True):
        first = int((after == 0).nonzero()[0])
        assert torch.equal(after[:first], before[:first])
        changed += int((after[first + 1 :] != before[first + 1 :]).sum())
    assert changed > 0


@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "matrix"), ("2:4", "row"), ("4:8", "row")])
def test_what_comes_later_does_not_change_what_was_done(sparsity: str | float, scope: str) -> None:
    weight, x = torch.randn(12, 32), correlated(100, 32)
    other = weight.clone()
    other[:, 16:] = torch.randn(12, 16) * 5
    first, second = (solve("sparsegpt", given, x, sparsity, scope, block_size=8) for given in (weight, other))
    assert torch.equal(first[:, :16], second[:, :16])
    assert not torch.equal(first[:, 16:], second[:, 16:])


@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "row"), (0.5, "matrix"), ("2:4", "row")])
def test_dead_inputs_lose_their_weights(sparsity: str | float, scope: str) -> None:
    weight, x = torch.randn(8, 24), correlated(100, 24)
    dead = [0, 5, 6, 23]
    x[:, dead] = 0
    result = solve("sparsegpt", weight, x, sparsity, scope, block_size=8)
    assert (result[:, dead] == 0).all()
    assert torch.isfinite(result).all()
    expected = textbook_obs(weight, x, sparsity, scope, block_size=8)
    assert torch.equal(result == 0, expected == 0)
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.5, "2:4", "4:8", "1:4"])
def test_rows_can_be_solved_together_or_apart(method: str, sparsity: str | float) -> None:
    first, second, x = torch.randn(10, 48), torch.randn(3, 48), correlated(100, 48)
    together = solve(method, torch.cat([first, second]), x, sparsity)
    apart = torch.cat([solve(method, first, x, sparsity), solve(method, second, x, sparsity)])
    assert torch.equal(together == 0, apart == 0)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.5, 0.55, 0.6, 0.7, 0.9, "2:4", "4:8"])
def test_the_promised_zeros_are_there(method: str, scope: str, sparsity: str | float) -> None:
    """Over several blocks whose share of the sparsity is no whole number."""
    weight, x = torch.randn(30, 264), correlated(300, 264)
    pattern = parse(sparsity, scope)
    result = solvers.load(method).solve(weight, collected(x), pattern)
    assert pattern.holds(result)
    zeros = result == 0
    if isinstance(sparsity, str):
        n, m = map(int, sparsity.split(":"))
        assert (zeros.reshape(30, -1, m).sum(-1) == m - n).all()
    elif scope == "row":
        assert zeros.sum(-1).tolist() == [promised(sparsity, 264)] * 30
    else:
        assert int(zeros.sum()) == promised(sparsity, 30 * 264)


@pytest.mark.parametrize(("sparsity", "scope"), UNEVEN)
@pytest.mark.parametrize("block_size", [1, 3, 7, 16, 50, 99, 100, 128])
@pytest.mark.parametrize("features", [100, 97])
def test_the_zeros_of_sparsegpt_are_exact_at_every_block_size(
    sparsity: float, scope: str, block_size: int, features: int
) -> None:
    """In all, and in every run of columns that ends with a block."""
    weight, x = torch.randn(11, features), correlated(300, features)
    zeros = solve("sparsegpt", weight, x, sparsity, scope, block_size=block_size) == 0
    for end in {*range(block_size, features, block_size), features}:
        if scope == "row":
            assert zeros[:, :end].sum(-1).tolist() == [promised(sparsity, end)] * 11
        else:
            assert int(zeros[:, :end].sum()) == promised(sparsity, 11 * end)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("layout", ["rows", "one row", "columns"])
def test_the_dense_weight_is_not_changed(method: str, sparsity: str | float, layout: str) -> None:
    weight = {"rows": torch.randn(6, 16), "one row": torch.randn(1, 16), "columns": torch.randn(16, 6).T}[layout]
    before = weight.clone()
    result = solve(method, weight, correlated(50, 16), sparsity)
    assert torch.equal(weight, before)
    assert not torch.equal(result, before)


@pytest.mark.parametrize("method", METHODS)
def test_memory_layout_makes_no_difference(method: str) -> None:
    weight, x = torch.randn(6, 16), correlated(50, 16)
    expected = solve(method, weight.clone(), x, "2:4")
    torch.testing.assert_close(solve(method, weight.T.contiguous().T, x, "2:4"), expected)


@pytest.mark.parametrize("method", METHODS)
def test_results_are_float32_of_the_same_shape(method: str) -> None:
    result = solve(method, torch.randn(6, 16), correlated(50, 16), "2:4")
    assert result.dtype == torch.float32
    assert result.shape == (6, 16)


@pytest.mark.parametrize("method", solvers.names())
def test_every_method_loads_by_name_and_says_what_it_needs(method: str) -> None:
    solver = solvers.load(method)
    assert solver.needs in LEVELS
    assert solver.scope in SCOPES
    assert solver == solvers.load({"name": method})


def test_the_published_methods_are_there_with_their_published_defaults() -> None:
    assert set(METHODS) <= set(solvers.names())
    assert [solvers.load(name).scope for name in METHODS] == ["matrix", "row", "matrix"]
    assert [solvers.load(name).needs for name in METHODS] == ["nothing", "norms", "gram"]
    assert solvers.load("sparsegpt") == solvers.load({"name": "sparsegpt", "damping": 0.01, "block_size": 128})


def test_load_leaves_the_mapping_as_it_was() -> None:
    asked = {"name": "sparsegpt", "damping": 0.05}
    assert solvers.load(asked).damping == 0.05  # type: ignore[attr-defined]
    assert asked == {"name": "sparsegpt", "damping": 0.05}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("wnda", "unknown method 'wnda': did you mean 'wanda'?"),
        ("SparseGPT", "unknown method 'SparseGPT': did you mean 'sparsegpt'?"),
        ("", "unknown method '': known: "),
        ({"name": "magnitud"}, "unknown method 'magnitud': did you mean 'magnitude'?"),
        ({"name": "__init__"}, "unknown method '__init__'"),
        ({"damping": 0.1}, "has no name; known: "),
        ({"name": 3}, "has no name; known: "),
        (
            {"name": "sparsegpt", "dampng": 0.1},
            "unknown method sparsegpt key 'dampng': did you mean 'damping'? known: block_size, damping",
        ),
        (
            {"name": "sparsegpt", "blocksize": 64},
            "unknown method sparsegpt key 'blocksize': did you mean 'block_size'? known: block_size, damping",
        ),
        ({"name": "sparsegpt", "zzz": 1}, "unknown method sparsegpt key 'zzz': known: block_size, damping"),
        ({"name": "sparsegpt", 3: 1}, "unknown method sparsegpt key '3': known: block_size, damping"),
        ({"name": "wanda", "damping": 0.1}, "method wanda has no options, but 'damping' was given"),
        ({"name": "magnitude", "zzz": None}, "method magnitude has no options, but 'zzz' was given"),
    ],
)
def test_load_names_the_nearest(asked: str | dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        solvers.load(asked)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("damping", 0, "method sparsegpt: damping must lie in (0, 1], not 0.0"),
        ("damping", -0.01, "method sparsegpt: damping must lie in (0, 1], not -0.01"),
        ("damping", 1.5, "method sparsegpt: damping must lie in (0, 1], not 1.5"),
        ("damping", float("nan"), "method sparsegpt: damping must lie in (0, 1], not nan"),
        ("block_size", 0, "method sparsegpt: block_size must be at least 1, not 0"),
        ("block_size", -128, "method sparsegpt: block_size must be at least 1, not -128"),
        ("damping", "much", "method sparsegpt.damping must be float, not 'much'"),
        ("damping", "0.1", "method sparsegpt.damping must be float, not '0.1'"),
        ("damping", None, "method sparsegpt.damping must be float, not None"),
        ("damping", True, "method sparsegpt.damping must be float, not True"),
        ("block_size", 12.5, "method sparsegpt.block_size must be int, not 12.5"),
        ("block_size", 64.0, "method sparsegpt.block_size must be int, not 64.0"),
        ("block_size", "wide", "method sparsegpt.block_size must be int, not 'wide'"),
        ("block_size", None, "method sparsegpt.block_size must be int, not None"),
        ("block_size", True, "method sparsegpt.block_size must be int, not True"),
    ],
)
def test_options_out_of_range_or_of_the_wrong_kind_are_the_users_mistake(
    option: str, value: object, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        solvers.load({"name": "sparsegpt", option: value})
    assert str(caught.value) == message


@pytest.mark.parametrize("damping", [1e-6, 1, 1.0])
def test_the_bounds_of_damping_are_allowed(damping: float) -> None:
    found = solvers.load({"name": "sparsegpt", "damping": damping}).damping  # type: ignore[attr-defined]
    assert found == damping
    assert isinstance(found, float)
