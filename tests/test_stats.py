"""Statistics of a linear's inputs, against the same sums done directly in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.errors import SingularGram
from llmprune.stats import LEVELS, LinearStats, Needs, damped_inverse

WIDTHS = [1, 7, 100, 255, 256, 257, 600]


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated inputs of uneven size (tokens, features)."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=random) / features**0.5 + torch.eye(features)
    return torch.randn(tokens, features, generator=random) @ mix * torch.linspace(0.3, 2, features)


def collected(*batches: Tensor, needs: Needs = "gram") -> LinearStats:
    stats = LinearStats(batches[0].shape[-1], needs)
    for batch in batches:
        stats.add(batch)
    stats.finish()
    return stats


def with_gram(gram: Tensor) -> LinearStats:
    """Statistics that hold this very matrix."""
    stats = LinearStats(len(gram), "gram")
    stats.tokens = 1234
    assert stats._lower is not None
    for panel in stats._lower.panels:
        panel.copy_(gram[panel.shape[1] - len(panel) : panel.shape[1], : panel.shape[1]])
    stats.finish()
    return stats


def with_eigenvalue(lowest: float, features: int = 12) -> LinearStats:
    """A Gram with a mean diagonal of 1 whose lowest eigenvalue is the given one, and the others are equal."""
    values = torch.full((features,), (features - lowest) / (features - 1), dtype=torch.float64)
    values[0] = lowest
    basis = torch.linalg.qr(torch.randn(features, features, generator=torch.Generator().manual_seed(1)).double())[0]
    return with_gram(basis @ values.diag() @ basis.T)


def indefinite(lowest: float, features: int = 12) -> LinearStats:
    """A Gram of inputs with a norm of one, the first two of which are alike beyond what can be."""
    gram = torch.eye(features)
    gram[0, 1] = gram[1, 0] = 1 - lowest
    return with_gram(gram)


def direct_error(x: Tensor, dense: Tensor, pruned: Tensor) -> float:
    x, dense, pruned = x.double(), dense.double(), pruned.double()
    return float((x @ (pruned - dense).T).square().sum() / (x @ dense.T).square().sum())


@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("sizes", [(64,), (3, 50, 120)])
def test_gram_is_the_sum_of_xtx(features: int, sizes: tuple[int, ...]) -> None:
    batches = [inputs(size, features, seed) for seed, size in enumerate(sizes)]
    stats = collected(*batches)
    x = torch.cat(batches).double()
    torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=1e-5, atol=1e-4)
    assert torch.equal(stats.gram, stats.gram.T)
    assert stats.tokens == sum(sizes)


@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("needs", LEVELS)
def test_norms_at_every_level(features: int, needs: Needs) -> None:
    batches = [inputs(40, features, seed) for seed in range(3)]
    stats = collected(*batches, needs=needs)
    expected = torch.cat(batches).double().norm(dim=0)
    torch.testing.assert_close(stats.norms.double(), expected, rtol=1e-5, atol=1e-6)
    assert stats.tokens == 120
    assert stats.norms.dtype == torch.float32


@pytest.mark.parametrize("needs", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_summed_in_float32(needs: Needs, dtype: torch.dtype) -> None:
    x = inputs(300, 20).to(dtype)
    stats = collected(x, needs=needs)
    assert stats.squares.dtype == torch.float32
    torch.testing.assert_close(stats.squares.double(), x.double().square().sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needs", LEVELS)
def test_leading_dimensions_are_tokens(needs: Needs) -> None:
    x = inputs(60, 16)
    flat, deep = collected(x, needs=needs), collected(x.reshape(3, 4, 5, 16), needs=needs)
    assert flat.tokens == deep.tokens == 60
    assert torch.equal(flat.squares, deep.squares)


@pytest.mark.parametrize("needs", LEVELS)
def test_an_empty_batch_changes_nothing(needs: Needs) -> None:
    x = inputs(10, 16)
    stats = collected(torch.zeros(0, 16), x, torch.zeros(2, 0, 16), needs=needs)
    assert stats.tokens == 10
    assert torch.equal(stats.squares, collected(x, needs=needs).squares)


@pytest.mark.parametrize("needs", ["nothing", "norms"])
def test_a_gram_that_was_not_asked_for_is_not_there(needs: Needs) -> None:
    with pytest.raises(RuntimeError, match="no Gram was collected"):
        _ = collected(inputs(10, 4), needs=needs).gram


@pytest.mark.parametrize("needs", LEVELS)
def test_dead_inputs_were_zero_on_every_token(needs: Needs) -> None:
    first, second = inputs(10, 6), inputs(10, 6, seed=1)
    first[:, [1, 4]] = 0
    second[:, [1, 2]] = 0
    stats = collected(first, second, needs=needs)
    assert stats.dead.tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("features", [1, 5, 64, 300])
@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
def test_inverse_factor_is_that_of_the_damped_gram(features: int, damping: float) -> None:
    x = inputs(3 * features + 20, features)
    stats = collected(x)
    upper = stats.inverse_factor(damping).double()
    gram = x.double().T @ x.double()
    expected = torch.linalg.inv(gram + damping * gram.diagonal().mean() * torch.eye(features))
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert stats.damping == damping


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e4])
def test_inverse_factor_at_any_size_of_the_inputs(size: float) -> None:
    x = inputs(200, 24)
    scaled = collected(x * size).inverse_factor(0.01) * size
    torch.testing.assert_close(scaled, collected(x).inverse_factor(0.01), rtol=1e-3, atol=1e-5)


def test_damping_is_a_fraction_of_the_mean_over_live_inputs() -> None:
    x = inputs(100, 12)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[0, 5, 11]] = True
    x[:, dead] = 0
    stats = collected(x)
    upper = stats.inverse_factor(0.1).double()
    live = x[:, ~dead].double()
    gram = live.T @ live
    expected = torch.linalg.inv(gram + 0.1 * gram.diagonal().mean() * torch.eye(9))
    product = upper.T @ upper
    torch.testing.assert_close(product[~dead][:, ~dead], expected, rtol=1e-4, atol=1e-8)
    assert (product[dead][:, ~dead] == 0).all()
    assert (upper.diagonal()[dead] > 0).all()
    assert torch.isfinite(upper).all()
    assert stats.damping == 0.1
    assert torch.equal(stats.inverse_factor(0.5).diagonal()[dead].double(), upper.diagonal()[dead])


def test_inverse_factor_where_every_input_is_dead() -> None:
    upper = collected(torch.zeros(10, 5)).inverse_factor(0.01)
    assert torch.isfinite(upper).all()
    assert torch.equal(upper, upper.diagonal().diag())
    assert (upper.diagonal() > 0).all()


@pytest.mark.parametrize("tokens", [1, 3, 39])
def test_fewer_tokens_than_inputs_is_enough(tokens: int) -> None:
    x = inputs(tokens, 40)
    stats = collected(x)
    upper = stats.inverse_factor(0.01).double()
    gram = x.double().T @ x.double()
    assert torch.linalg.matrix_rank(gram) == tokens
    expected = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(40))
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))
    assert stats.damping == 0.01


def test_the_factor_is_shared_until_another_damping_is_asked_for() -> None:
    stats = collected(inputs(100, 10))
    assert stats.damping is None
    first = stats.inverse_factor(0.01)
    assert stats.inverse_factor(0.01) is first
    second = stats.inverse_factor(0.5)
    assert stats.damping == 0.5
    assert (second.diagonal() < first.diagonal()).all()
    torch.testing.assert_close(stats.inverse_factor(0.01), first)
    assert stats.damping == 0.01


@pytest.mark.parametrize(
    ("lowest", "asked", "taken"),
    [(0.5, 0.01, 0.01), (-0.05, 0.01, 0.1), (-0.5, 0.01, 1.0), (-0.5, 0.1, 1.0), (-0.7, 0.5, 1.0), (-0.05, 1e-5, 0.1)],
)
def test_a_gram_that_is_not_positive_definite_is_damped_ten_times_more(
    lowest: float, asked: float, taken: float
) -> None:
    stats = with_eigenvalue(lowest)
    upper = stats.inverse_factor(asked).double()
    assert stats.damping == pytest.approx(taken)
    gram = stats.gram.double()
    expected = torch.linalg.inv(gram + taken * gram.diagonal().mean() * torch.eye(len(gram)))
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-3, atol=1e-4)
    assert stats.inverse_factor(asked).double().equal(upper)
    assert stats.damping == pytest.approx(taken)


def scaled(gram: Tensor) -> Tensor:
    norms = gram.double().diagonal().sqrt()
    return gram.double() / norms.outer(norms)


@pytest.mark.parametrize("features", [1, 5, 64, 300])
@pytest.mark.parametrize("shift", [0.02, 1.0])
def test_scaled_gram_and_its_inverse(features: int, shift: float) -> None:
    stats = collected(inputs(features // 2 + 1, features))
    expected = scaled(stats.gram) + 0.1 * torch.eye(features)
    gram = stats.scaled_gram(0.1)
    torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-5)
    assert stats.damping == 0.1
    wanted = torch.linalg.inv(expected + shift * torch.eye(features))
    for inverse in (damped_inverse(gram, shift), stats.scaled_inverse(0.1, shift)):
        assert inverse.is_contiguous()
        torch.testing.assert_close(inverse, inverse.T)
        torch.testing.assert_close(inverse.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))
    assert torch.equal(gram, collected(inputs(features // 2 + 1, features)).scaled_gram(0.1))


def test_dead_inputs_are_apart_in_the_scaled_gram() -> None:
    x = inputs(100, 12)
    dead = [0, 5, 11]
    x[:, dead] = 0
    stats = collected(x)
    assert stats.inverse_norms[dead].tolist() == [0, 0, 0]
    assert torch.equal(stats.scaled_gram(0.25)[dead], 0.25 * torch.eye(12)[dead])
    inverse = stats.scaled_inverse(0.25, 0.75)
    torch.testing.assert_close(inverse[dead], torch.eye(12)[dead])


def test_what_was_made_of_the_gram_last_is_shared() -> None:
    stats = collected(inputs(100, 10))
    gram = stats.scaled_gram(0.1)
    assert stats.scaled_gram(0.1) is gram
    inverse = stats.scaled_inverse(0.1, 1.0)
    assert stats.scaled_inverse(0.1, 1.0) is inverse
    assert not torch.equal(stats.scaled_inverse(0.1, 2.0), inverse)
    stats.inverse_factor(0.5)
    assert stats.damping == 0.5
    again = stats.scaled_gram(0.1)
    assert again is not gram
    assert torch.equal(again, gram)
    assert stats.damping == 0.1


@pytest.mark.parametrize(("lowest", "asked", "taken"), [(0.5, 0.01, 0.01), (-0.05, 0.01, 0.1), (-0.5, 0.1, 1.0)])
def test_a_scaled_gram_is_damped_until_it_is_positive_definite(lowest: float, asked: float, taken: float) -> None:
    stats = indefinite(lowest)
    gram = stats.scaled_gram(asked).double()
    assert stats.damping == pytest.approx(taken)
    torch.testing.assert_close(gram, scaled(stats.gram) + taken * torch.eye(len(gram)), rtol=1e-4, atol=1e-5)
    assert torch.linalg.eigvalsh(gram)[0] > 0
    stats.scaled_inverse(asked, 1.0)
    assert stats.damping == pytest.approx(asked)


def test_hopeless_scaled_grams_are_errors_too() -> None:
    stats = indefinite(-4)
    for ask in (lambda: stats.scaled_gram(0.1), lambda: stats.scaled_inverse(0.1, 0.5)):
        with pytest.raises(SingularGram, match=r"1,234 tokens x 12 inputs .* damping 0.1, 1 in float32 and float64"):
            ask()
    with pytest.raises(SingularGram, match="a Gram of 12 inputs is not positive definite with damping 1"):
        damped_inverse(stats.gram, 1.0)


@pytest.mark.parametrize(("asked", "tried"), [(0.01, "0.01, 0.1, 1 "), (0.1, "0.1, 1 "), (1.0, "damping 1 ")])
def test_a_hopeless_gram_is_an_error_that_says_what_was_tried(asked: float, tried: str) -> None:
    stats = with_eigenvalue(-3)
    with pytest.raises(SingularGram, match="1,234 tokens x 12 inputs") as caught:
        stats.inverse_factor(asked)
    assert tried in str(caught.value)
    assert "calibration samples" in str(caught.value)
    assert stats.damping is None


@pytest.mark.parametrize("features", [8, 300])
def test_relative_error_is_exact_from_the_gram(features: int) -> None:
    x = inputs(400, features)
    dense = torch.randn(10, features)
    pruned = dense * (torch.rand(10, features) > 0.5)
    error = collected(x[:150], x[150:]).relative_error(dense, pruned)
    assert error == pytest.approx(direct_error(x, dense, pruned), rel=1e-4)


@pytest.mark.parametrize("needs", ["nothing", "norms"])
@pytest.mark.parametrize("sizes", [(1,), (40,), (40, 30, 50)])
def test_relative_error_is_exact_while_all_rows_are_kept(needs: Needs, sizes: tuple[int, ...]) -> None:
    batches = [inputs(size, 24, seed) for seed, size in enumerate(sizes)]
    dense = torch.randn(10, 24)
    pruned = dense * (torch.rand(10, 24) > 0.5)
    stats = collected(*(batch.clone() for batch in batches), needs=needs)
    assert stats.relative_error(dense, pruned) == pytest.approx(
        direct_error(torch.cat(batches), dense, pruned), rel=1e-4
    )


def test_relative_error_is_estimated_well_from_a_sample_of_all_batches() -> None:
    batches = [inputs(500, 16, seed) for seed in range(6)]
    dense = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    pruned = dense * (dense.abs() > 0.6)
    estimate = collected(*batches, needs="norms").relative_error(dense, pruned)
    exact = direct_error(torch.cat(batches), dense, pruned)
    assert estimate == pytest.approx(exact, rel=0.25)
    assert estimate != pytest.approx(direct_error(batches[0], dense, pruned), rel=1e-6)


def test_the_sample_is_not_changed_by_what_happens_to_the_inputs_later() -> None:
    x = inputs(30, 8)
    stats = collected(x, needs="norms")
    dense, pruned = torch.randn(4, 8), torch.randn(4, 8)
    before = stats.relative_error(dense, pruned)
    x.mul_(torch.arange(8.0))
    assert stats.relative_error(dense, pruned) == before


@pytest.mark.parametrize("needs", LEVELS)
def test_relative_error_is_0_for_the_same_weight_and_1_for_none(needs: Needs) -> None:
    stats = collected(inputs(50, 8), needs=needs)
    dense = torch.randn(4, 8)
    assert stats.relative_error(dense, dense) == 0
    assert stats.relative_error(dense, torch.zeros(4, 8)) == pytest.approx(1)


@pytest.mark.parametrize("needs", LEVELS)
def test_relative_error_is_not_known_without_inputs(needs: Needs) -> None:
    stats = LinearStats(8, needs)
    stats.finish()
    assert stats.relative_error(torch.randn(4, 8), torch.zeros(4, 8)) is None


@pytest.mark.parametrize("ranks", [2, 256, 300])
def test_every_rank_gives_to_the_sample(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks but one saw nothing; its rows alone must tell the error, however many ranks there are."""
    from llmprune import distributed

    monkeypatch.setattr(distributed, "size", lambda: ranks)
    monkeypatch.setattr(distributed, "rank", lambda: ranks - 1)
    stats = collected(inputs(50, 8), needs="norms")
    dense = torch.randn(4, 8)
    assert stats.relative_error(dense, torch.zeros(4, 8)) == pytest.approx(1)
    assert stats.relative_error(dense, dense * 0.5) == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("features", [1, 7, 255, 256, 257, 400, 512, 513, 700, 768, 1000])
def test_a_gram_is_made_whole_where_it_was_summed_up(
    features: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the memory of its panels; also where the device has no float64."""
    monkeypatch.setattr("llmprune.stats.sums_dtype", lambda _: getattr(torch, dtype))
    x = torch.randint(-8, 9, (64, features), generator=torch.Generator().manual_seed(features)).float()
    found = collected(x[:40], x[40:])
    assert torch.equal(found.gram, x.T @ x)
    assert found.gram.untyped_storage().nbytes() <= 4 * features * (features + 256) + 4 * 256**2
