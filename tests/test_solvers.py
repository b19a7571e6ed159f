"""Every method against its published formula, written out anew in plain loops and float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from llmprune import solvers
from llmprune.errors import SingularGram, UserError
from llmprune.patterns import SCOPES, keep_more, parse
from llmprune.solvers import alps
from llmprune.stats import LEVELS, LinearStats, damped_inverse
from tests.test_stats import indefinite

METHODS = ["magnitude", "wanda", "sparsegpt"]
ALL = solvers.names()

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
    total that the sparsity promises for the columns so far; of an unstructured one for the columns of live inputs, from
    which the zeros in the others, all of which go here, are taken off.
    """
    w, h = weight.double().clone(), x.double().T @ x.double()
    live = h.diagonal() > 0
    apart = not isinstance(sparsity, str) and not bool(live.all())
    if apart:
        sparsity = (float(sparsity) * len(live) - int((~live).sum())) / int(live.sum())
    h += damping * h.diagonal()[live].mean() * torch.eye(len(h))
    w[:, ~live] = 0
    inverses = [torch.linalg.inv(h[column:, column:]) for column in range(len(h))]
    together = int(sparsity.split(":")[1]) if isinstance(sparsity, str) else block_size
    pruned: set[tuple[int, int]] = set()
    for column, inverse in enumerate(inverses):
        if column % together == 0:
            ahead = [place for place in range(column, min(column + together, len(h))) if live[place] or not apart]
            before = int(live[:column].sum()) if apart else column
            table = [[float(row[place] ** 2 / inverses[place][0, 0]) for place in ahead] for row in w]
            pruned |= {(row, ahead[place]) for row, place in lowest(table, sparsity, scope, before=before)}
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
def test_the_weights_of_dead_inputs_go_first(sparsity: str | float, scope: str) -> None:
    weight, x = torch.randn(8, 24), correlated(100, 24)
    dead = [0, 5, 6, 23]
    x[:, dead] = 0
    result = solve("sparsegpt", weight, x, sparsity, scope, block_size=8)
    assert (result[:, dead] == 0).all()
    assert torch.isfinite(result).all()
    expected = textbook_obs(weight, x, sparsity, scope, block_size=8)
    assert torch.equal(result == 0, expected == 0)
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [name for name in ALL if solvers.load(name).row_independent])
@pytest.mark.parametrize("sparsity", [0.5, "2:4", "4:8", "1:4"])
def test_rows_can_be_solved_together_or_apart(method: str, sparsity: str | float) -> None:
    first, second, x = torch.randn(10, 48), torch.randn(3, 48), correlated(100, 48)
    together = solve(method, torch.cat([first, second]), x, sparsity)
    apart = torch.cat([solve(method, first, x, sparsity), solve(method, second, x, sparsity)])
    assert torch.equal(together == 0, apart == 0)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ALL)
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


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("layout", ["rows", "one row", "columns"])
def test_the_dense_weight_is_not_changed(method: str, sparsity: str | float, layout: str) -> None:
    weight = {"rows": torch.randn(6, 16), "one row": torch.randn(1, 16), "columns": torch.randn(16, 6).T}[layout]
    before = weight.clone()
    result = solve(method, weight, correlated(50, 16), sparsity)
    assert torch.equal(weight, before)
    assert not torch.equal(result, before)


@pytest.mark.parametrize("method", ALL)
def test_memory_layout_makes_no_difference(method: str) -> None:
    weight, x = torch.randn(6, 16), correlated(50, 16)
    expected = solve(method, weight.clone(), x, "2:4")
    torch.testing.assert_close(solve(method, weight.T.contiguous().T, x, "2:4"), expected)


@pytest.mark.parametrize("method", ALL)
def test_results_are_float32_of_the_same_shape(method: str) -> None:
    result = solve(method, torch.randn(6, 16), correlated(50, 16), "2:4")
    assert result.dtype == torch.float32
    assert result.shape == (6, 16)


@pytest.mark.parametrize("method", ALL)
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


@pytest.mark.parametrize(
    ("name", "scope", "options"),
    [
        ("ria", "matrix", {"exponent": 0.5}),
        ("admm", "matrix", {"damping": 0.1, "rho": 1.0, "iterations": 20, "gradual": 15}),
        ("alps", "matrix", {"damping": 0.01, "rho": 0.1, "iterations": 300, "steps": 10}),
    ],
)
def test_the_defaults_of_the_others_are_published_ones(name: str, scope: str, options: dict[str, float]) -> None:
    solver = solvers.load(name)
    assert asdict(solver) == options  # type: ignore[call-overload]
    assert solver.scope == scope


def test_alps_raises_its_penalty_as_published() -> None:
    assert (alps.CHECK, alps.STEPS, alps.LARGEST) == (3, ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1)), 1e6)


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


@pytest.mark.parametrize(("sparsity", "scope"), UNSTRUCTURED + UNEVEN + SEMI)
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_ria_ranks_by_the_shares_of_row_and_column(sparsity: str | float, scope: str, exponent: float) -> None:
    weight, x = torch.randn(12, 40), correlated(90, 40)
    norms = [math.sqrt(sum(value * value for value in column)) for column in x.double().T.tolist()]
    table = [[abs(value) for value in row] for row in weight.double().tolist()]
    columns = [sum(row[j] for row in table) for j in range(40)]
    scores = [
        [(value / columns[j] + value / sum(row)) * norms[j] ** exponent for j, value in enumerate(row)] for row in table
    ]
    expected = masked(weight, lowest(scores, sparsity, scope))
    assert torch.equal(solve("ria", weight, x, sparsity, scope, exponent=exponent), expected)


def test_ria_takes_columns_and_rows_of_zeros() -> None:
    weight = torch.randn(8, 16)
    weight[:, 3], weight[2] = 0, 0
    result = solve("ria", weight, correlated(50, 16), "2:4")
    assert bool(result.isfinite().all())


def gradual_masks(scores: list[Tensor], sparsity: str | float, scope: str, steps: int) -> list[set[tuple[int, int]]]:
    """The pruned places at each step: the lowest s_t of those that the pattern prunes in the end."""
    found = []
    share = 1 - Fraction(*map(int, sparsity.split(":"))) if isinstance(sparsity, str) else sparsity
    for step, table in enumerate(scores, 1):
        part = 1 - (1 - step / steps) ** 3
        final = lowest(table.tolist(), sparsity, scope)
        rows = range(len(table)) if scope == "row" else [None]
        pruned = set()
        for row in rows:
            places = [place for place in final if row is None or place[0] == row]
            count = int(part * float(share) * (table.numel() if row is None else table.shape[1]) + 1e-6)
            pruned |= set(sorted(places, key=lambda place: (float(table[place]), place))[:count])
        found.append(pruned)
    return found


@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "row"), (0.5, "matrix"), (0.7, "row"), *SEMI])
def test_a_mask_grows_to_that_of_its_pattern(sparsity: str | float, scope: str) -> None:
    scores = [torch.rand(6, 24) for _ in range(15)]
    expected = gradual_masks(scores, sparsity, scope, 15)
    for step, (table, pruned) in enumerate(zip(scores, expected, strict=True), 1):
        keep = keep_more(parse(sparsity, scope), table, 1 - (1 - step / 15) ** 3)
        assert {(int(row), int(column)) for row, column in (~keep).nonzero()} == pruned
    assert torch.equal(keep, parse(sparsity, scope).keep(scores[-1]))


def textbook_admm(weight: Tensor, x: Tensor, sparsity: str | float, scope: str) -> Tensor:
    """arXiv:2401.02938 with a schedule that grows, in float64."""
    norms = x.double().square().sum(0).sqrt()
    gram = (x.double().T @ x.double()) / torch.outer(norms, norms) + 0.1 * torch.eye(len(norms))
    dense = weight.double() * norms
    current, dual, mask = dense.clone(), torch.zeros_like(dense), torch.ones_like(dense)
    for step in range(1, 21):
        if step <= 15:
            mask = torch.ones_like(dense)
            table = (current + dual).abs()
            for place in gradual_masks([*[table] * step], sparsity, scope, 15)[-1]:
                mask[place] = 0
        split = (current + dual) * mask
        dual = dual + current - split
        current = torch.linalg.solve(gram + torch.eye(len(norms)), (dense @ gram + split - dual).T).T
    return (current + dual) * mask / norms


@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "row"), (0.5, "matrix"), (0.7, "matrix"), *SEMI])
@pytest.mark.parametrize("tokens", [200, 15])
def test_admm_is_that_of_the_paper(sparsity: str | float, scope: str, tokens: int) -> None:
    weight, x = torch.randn(8, 24), correlated(tokens, 24)
    result, expected = solve("admm", weight, x, sparsity, scope), textbook_admm(weight, x, sparsity, scope)
    same = ((result == 0) == (expected == 0)).all(-1)
    assert same.float().mean() >= 0.75  # a tie that falls the other way changes the rest of its row
    torch.testing.assert_close(result[same].double(), expected[same], rtol=1e-2, atol=1e-2)


def test_admm_solves_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(30, 32), correlated(100, 32)
    expected = solve("admm", weight, x, "2:4")
    monkeypatch.setattr("llmprune.parts.AT_ONCE", 32 * 8)
    result = solve("admm", weight, x, "2:4")
    assert ((result == 0) == (expected == 0)).float().mean() >= 0.99


def textbook_alps(weight: Tensor, x: Tensor, sparsity: str | float, scope: str) -> tuple[Tensor, int]:
    """The splitting of arXiv:2406.07831 by an eigendecomposition, in float64: D in the end, and its iterations."""
    norms = x.double().square().sum(0).sqrt()
    gram = (x.double().T @ x.double()) / torch.outer(norms, norms) + 0.01 * torch.eye(len(norms))
    values, vectors = torch.linalg.eigh(gram)
    dense = weight.double() * norms
    pattern, rho = parse(sparsity, scope), 0.1
    first = support = pattern.keep(dense.abs())
    sparse, dual, restarts = dense * support, torch.zeros_like(dense), 0
    for iteration in range(1, 301):
        free = (dense @ gram - dual + rho * sparse) @ vectors / (values + rho) @ vectors.T
        both = free + dual / rho
        now = pattern.keep(both.abs())
        sparse = torch.where(now, both, torch.zeros_like(both))
        dual = dual + rho * (free - sparse)
        if iteration % 3 == 0:
            changed, support = float((now != support).sum()) / int(first.sum()), now
            if changed == 0 and torch.equal(now, first) and restarts < 4:
                restarts, rho, sparse, dual = restarts + 1, rho / 5, dense * first, torch.zeros_like(dense)
                support = first
            elif changed == 0:
                break
            else:
                rho = min(1e6, rho * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1))
    return sparse / norms, iteration


@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "row"), (0.5, "matrix"), (0.7, "matrix"), *SEMI])
def test_alps_finds_the_support_of_the_paper_and_its_optimum(sparsity: str | float, scope: str) -> None:
    weight, x = torch.randn(16, 32), correlated(200, 32)
    result = solve("alps", weight, x, sparsity, scope, steps=60)
    expected, iterations = textbook_alps(weight, x, sparsity, scope)
    assert 3 < iterations < 300
    same = (result != 0) == (expected != 0)
    assert same.float().mean() > 0.97
    norms = x.double().square().sum(0).sqrt()
    gram = x.double().T @ x.double() + 0.01 * torch.diag(norms.square())
    for row, found in zip(weight.double(), result.double(), strict=True):
        places = found.nonzero()[:, 0]
        best = torch.linalg.solve(gram[places][:, places], gram[places] @ row)
        torch.testing.assert_close(found[places], best, rtol=1e-2, atol=1e-2)


def test_alps_begins_anew_where_its_support_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With so large a penalty at first nothing moves; each time it begins anew it is a fifth of that."""
    weight, x = torch.randn(16, 32), correlated(200, 32)
    penalties: list[float] = []

    def seen(gram: Tensor, damping: float) -> Tensor:
        penalties.append(damping)
        return damped_inverse(gram, damping)

    monkeypatch.setattr(alps, "damped_inverse", seen)
    found = solve("alps", weight, x, 0.5, rho=1e5)
    assert penalties == pytest.approx([1e5, 2e4, 4e3, 800, 160])
    assert torch.equal(found != 0, solve("wanda", weight, x, 0.5) != 0)  # with which it begins
    moved = solve("alps", weight, x, 0.5, rho=300)
    assert not torch.equal(moved != 0, found != 0)
    assert penalties[5:7] == pytest.approx([300, 60])


@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "matrix"), (0.7, "matrix"), ("2:4", "row"), ("4:8", "row")])
@pytest.mark.parametrize("seed", range(3))
def test_alps_and_admm_lose_less_than_sparsegpt(sparsity: str | float, scope: str, seed: int) -> None:
    weight, x = torch.randn(32, 64), correlated(300, 64, seed=seed) * torch.linspace(0.2, 3, 64)
    names = ("sparsegpt", "admm", "alps")
    error = {name: relative_error(x, weight, solve(name, weight, x, sparsity, scope)) for name in names}
    assert error["alps"] < error["admm"] < error["sparsegpt"]


@pytest.mark.parametrize("method", ["admm", "alps"])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_dead_inputs_and_fewer_tokens_than_inputs(method: str, sparsity: str | float) -> None:
    weight, x = torch.randn(8, 24), correlated(7, 24)
    dead = [0, 5, 6, 23]
    x[:, dead] = 0
    result = solve(method, weight, x, sparsity)
    assert (result[:, dead] == 0).all()
    assert torch.isfinite(result).all()
    assert parse(sparsity).holds(result)
    assert relative_error(x, weight, result) < relative_error(x, weight, solve("wanda", weight, x, sparsity))


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "admm", "alps"])
@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "row"), (0.5, "matrix"), ("2:4", "row"), ("1:4", "row")])
@pytest.mark.parametrize("scattered", [True, False])
def test_of_dead_inputs_go_the_smallest_and_no_more_than_is_asked(
    method: str, sparsity: str | float, scope: str, scattered: bool
) -> None:
    count = 256
    weight, x = torch.randn(8, count), correlated(300, count)
    dead = torch.arange(count) >= 64  # SparseGPT chooses for 128 at a time
    dead = dead[torch.randperm(count)] if scattered else dead
    x[:, dead] = 0
    pattern = parse(sparsity, scope)  # type: ignore[arg-type]
    result = solve(method, weight, x, sparsity, scope)
    assert int((result == 0).sum()) == pattern.count((8, count))
    assert pattern.holds(result)
    kept = result != 0
    assert torch.equal(result[kept & dead], weight[kept & dead])
    parts = [(weight.abs(), kept, dead.expand(8, count))]
    if pattern.group > 1:
        parts = [tuple(one.reshape(-1, pattern.group) for one in parts[0])]  # type: ignore[misc]
    if scope == "row":
        parts = [tuple(one[row : row + 1] for one in parts[0]) for row in range(len(parts[0][0]))]  # type: ignore[misc]
    stays = 0
    for size, here, unseen in parts:
        gone, left = size[unseen & ~here], size[unseen & here]
        if len(left):
            stays += 1
            assert here[~unseen].all()  # no other goes before the last of them
            assert not len(gone) or gone.max() < left.min()
    assert stays > len(parts) // 8


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "ria", "exponent": -1}, "exponent must be at least 0"),
        ({"name": "admm", "damping": 0}, "damping must lie in"),
        ({"name": "admm", "rho": 0}, "rho must be above 0"),
        ({"name": "admm", "gradual": 30}, "gradual must lie between 1 and iterations"),
        ({"name": "alps", "rho": -1}, "rho must be above 0"),
        ({"name": "alps", "damping": 2}, "damping must lie in"),
        ({"name": "alps", "iterations": 0}, "iterations must be at least 1"),
        ({"name": "alps", "steps": 0}, "steps must be at least 1"),
    ],
)
def test_options_of_the_others_are_checked(asked: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        solvers.load(asked)


@pytest.mark.parametrize(
    ("method", "lowest", "taken"), [("admm", -1.5, 1.0), ("alps", -0.05, 0.1), ("alps", -0.5, 1.0)]
)
def test_a_gram_that_is_not_positive_definite_is_damped_further_and_said(
    method: str, lowest: float, taken: float
) -> None:
    stats, weight = indefinite(lowest), torch.randn(6, 12)
    result = solvers.load(method).solve(weight, stats, parse("2:4"))
    assert stats.damping == pytest.approx(taken)
    assert torch.isfinite(result).all()
    assert parse("2:4").holds(result)


@pytest.mark.parametrize("method", ["admm", "alps"])
def test_a_hopeless_gram_is_a_failure(method: str) -> None:
    with pytest.raises(SingularGram, match="give it more calibration samples"):
        solvers.load(method).solve(torch.randn(6, 12), indefinite(-4.0), parse("2:4"))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "matrix"), ("2:4", "row")])
def test_the_same_request_gives_the_same_bits(method: str, sparsity: str | float, scope: str) -> None:
    weight, x = torch.randn(24, 32), correlated(100, 32)
    assert torch.equal(solve(method, weight, x, sparsity, scope), solve(method, weight, x, sparsity, scope))


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "alps"])
def test_linears_that_share_an_input_do_not_disturb_each_other(method: str) -> None:
    """What one method made of the Gram is kept with the statistics, and another method may come in between."""
    weight, x = torch.randn(12, 32), correlated(100, 32)
    expected, stats = solve(method, weight, x, "2:4"), collected(x)
    for name in (*ALL, method, method):
        result = solvers.load(name).solve(weight, stats, parse("2:4"))
    assert torch.equal(result, expected)
    assert torch.equal(stats.gram, collected(x).gram)
