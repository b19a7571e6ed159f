"""Batches that stand still in the middle of a block, what is collected from them, and what is surveyed beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llmprune.errors import Failure
from llmprune.model.activations import HIDDEN, Activations, Call
from llmprune.model.capture import Capture
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import find_linears
from llmprune.model.source import resolve
from llmprune.model.survey import Held, Survey
from llmprune.model.watch import Input, Mark, Stage
from llmprune.stats import Needs
from tests.families import make

CPU = torch.device("cpu")
BATCHES = 5


class Block(nn.Module):
    """Two linears that share an input, and one behind them; perhaps run twice."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.twice = twice
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.twice:
            x = x + self.down(self.left(x).relu() * self.right(x))
        return x + self.down(self.left(x).relu() * self.right(x))


def stage(*linears: str, features: int = 8, dense: bool = False, needs: Needs = "gram") -> Stage:
    """One input for the linears of these names."""
    return Stage((Input(tuple(f"block.{name}" for name in linears), features, needs),), dense)


UP, DOWN = stage("left", "right"), stage("down", features=12)
WHOLE = Stage((*UP.inputs, *DOWN.inputs), dense=True)


def batches(count: int = BATCHES) -> Activations:
    held = Activations(1, CPU)
    for seed in range(count):
        held.add(torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(seed)))
        held.calls[0].append(Call((HIDDEN,), {}))
    return held


@contextmanager
def running(
    block: nn.Module, stages: list[Stage], held: int = BATCHES, given: Activations | None = None
) -> Iterator[Capture]:
    capture = Capture(find_linears(block, "block"), stages, held)
    given = batches() if given is None else given
    with torch.no_grad(), capture.running(block, "block", given.calls[0], given):
        yield capture


def gram(inputs: list[Tensor]) -> Tensor:
    x = torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs]).double()
    return x.T @ x


def seen_by(module: nn.Module, block: nn.Module, given: Activations) -> list[Tensor]:
    """What a module is given when all batches run through the block as it is now."""
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        for batch in range(len(given)):
            block(given.read(batch))
    handle.remove()
    return caught


@pytest.mark.parametrize("held", [BATCHES, 2, 0])
def test_each_stage_sees_what_has_passed_the_linears_solved_before(held: int) -> None:
    block, given = Block(), batches()
    with running(block, [UP, DOWN], held) as capture:
        first = capture.collect(UP, CPU)
        assert first["block.left"] is first["block.right"]
        dense = Block()
        torch.testing.assert_close(
            first["block.right"].gram.double(), gram(seen_by(dense.right, dense, given)), rtol=1e-5, atol=1e-5
        )
        block.left.weight.mul_(0.5)
        block.right.weight[:6] = 0
        expected = Block()
        expected.load_state_dict(block.state_dict())
        second = capture.collect(DOWN, CPU)
        assert second.keys() == {"block.down"}
        assert second["block.down"].tokens == BATCHES * 20
        torch.testing.assert_close(
            second["block.down"].gram.double(), gram(seen_by(expected.down, expected, given)), rtol=1e-5, atol=1e-5
        )
        block.down.weight.mul_(2)
        expected.down.weight.mul_(2)
        for batch in reversed(range(BATCHES)):
            assert torch.equal(capture.finish(batch), expected(given.read(batch)))


@pytest.mark.parametrize(
    "stages", [[WHOLE], [stage("down", features=12, dense=True), stage("left", "right", dense=True)]]
)
def test_a_block_that_stays_dense_is_collected_as_it_was_and_run_again(stages: list[Stage]) -> None:
    block, given = Block(), batches()
    with running(block, stages) as capture:
        for one in stages:
            stats = capture.collect(one, CPU)
            for name in stats:
                leaf = name.removeprefix("block.")
                reference = Block()
                exact = gram(seen_by(reference.get_submodule(leaf), reference, given))
                torch.testing.assert_close(stats[name].gram.double(), exact, rtol=1e-5, atol=1e-5)
            for entry in one.inputs:
                for name in entry.linears:
                    block.get_submodule(name.removeprefix("block.")).weight.mul_(0.5)
        expected = Block()
        expected.load_state_dict(block.state_dict())
        for batch in range(BATCHES):
            assert torch.equal(capture.finish(batch), expected(given.read(batch)))


def test_what_stands_still_does_no_work_twice_and_what_does_not_is_run_anew() -> None:
    calls: dict[int, int] = {}
    for held in (BATCHES, 2, 0):
        block = Block()
        calls[held] = 0

        def counted(x: Tensor, block: Block = block, held: int = held) -> Tensor:
            calls[held] += 1
            return Block.forward(block, x)

        block.forward = counted  # type: ignore[method-assign]
        with running(block, [UP, DOWN], held) as capture:
            capture.collect(UP, CPU)
            capture.collect(DOWN, CPU)
            for batch in range(BATCHES):
                capture.finish(batch)
    assert calls == {BATCHES: BATCHES, 2: 2 + 3 * (BATCHES - 2), 0: 3 * BATCHES}


def test_a_linear_that_runs_twice_is_seen_twice() -> None:
    block = Block(twice=True)
    single = Stage(tuple(Input((f"block.{name}",), width, "norms") for name, width in
                         (("left", 8), ("right", 8), ("down", 12))), dense=True, again=True)  # fmt: skip
    with running(block, [single]) as capture:
        stats = capture.collect(single, CPU)
        assert {one.tokens for one in stats.values()} == {2 * BATCHES * 20}


def test_without_activations_there_is_nothing_to_see() -> None:
    block = Block()
    capture = Capture(find_linears(block, "block"), [UP], 0)
    with capture.running(block, "block", (), None):
        stats = capture.collect(UP, CPU)
    assert stats["block.left"] is stats["block.right"]
    assert stats["block.right"].tokens == 0


def test_what_is_left_standing_is_given_up() -> None:
    """After an error nothing of a run is left over: hooks, calls that stand still, or the tensors that they hold."""
    block, ended = Block(), []

    def forward(x: Tensor) -> Tensor:
        try:
            return Block.forward(block, x)
        finally:
            ended.append(1)

    block.forward = forward  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt), running(block, [UP, DOWN]) as capture:
        capture.collect(UP, CPU)
        assert not ended
        raise KeyboardInterrupt
    assert len(ended) == BATCHES
    assert not block.right._forward_pre_hooks


def test_an_error_in_the_middle_of_a_block_reaches_the_caller() -> None:
    block = Block()

    def broken(x: Tensor) -> Tensor:
        raise ValueError("broken")

    block.down.forward = broken  # type: ignore[method-assign]
    with running(block, [UP, DOWN]) as capture:
        capture.collect(UP, CPU)
        capture.collect(DOWN, CPU)
        with pytest.raises(ValueError, match="broken"):
            capture.finish(0)


def test_a_stage_that_is_missing_is_a_mistake_of_the_caller() -> None:
    with running(Block(), [UP, DOWN]) as capture:
        capture.collect(UP, CPU)
        with pytest.raises(RuntimeError, match=r"block\.down are not solved yet"):
            capture.finish(0)


class TestDataThatChangesTheCourse:
    def run(self, forward: Callable[[Block, int, Tensor], Tensor], stages: list[Stage], held: int = BATCHES) -> None:
        """Prune a block whose forward is told the number of the batch."""
        block, given = Block(), batches()
        numbers = {float(given.read(batch).sum()): batch for batch in range(BATCHES)}
        block.forward = lambda x: forward(block, numbers[float(x.sum())], x)  # type: ignore[method-assign]
        with running(block, stages, held, given=given) as capture:
            for one in stages:
                capture.collect(one, CPU)
            for batch in range(BATCHES):
                capture.finish(batch)

    @pytest.mark.parametrize("held", [BATCHES, 0])
    def test_linears_that_no_longer_share_are_an_error(self, held: int) -> None:
        def forward(block: Block, batch: int, x: Tensor) -> Tensor:
            return block.down(block.left(x) * block.right(x.clone() if batch == 3 else x))

        with pytest.raises(Failure, match=r"block\.right no longer shares its input with block\.left"):
            self.run(forward, [UP, DOWN], held)

    @pytest.mark.parametrize("held", [BATCHES, 0])
    def test_another_order_is_an_error(self, held: int) -> None:
        def forward(block: Block, batch: int, x: Tensor) -> Tensor:
            if batch == 3:
                y = block.down(functional.pad(x, (0, 4)))
                return block.left(y) + block.right(y)
            return block.down(block.left(x) * block.right(x))

        with pytest.raises(
            Failure, match=r"block\.left was passed over when its inputs were collected, and is run now"
        ):
            self.run(forward, [UP, DOWN], held)

    @pytest.mark.parametrize("held", [BATCHES, 2, 0])
    def test_a_linear_that_some_batches_leave_out_is_fine(self, held: int) -> None:
        def forward(block: Block, batch: int, x: Tensor) -> Tensor:
            return block.down(functional.pad(x, (0, 4)) if batch == 3 else block.left(x) * block.right(x))

        self.run(forward, [UP, DOWN], held)


def test_a_mark_knows_its_tensor_again_and_no_other() -> None:
    x = torch.randn(20, 8)
    mark = Mark(x)
    assert mark == Mark(x.view(20, 8))
    assert mark != Mark(x.clone())
    assert mark != Mark(x[:10])
    assert mark != Mark(x.view(8, 20))
    assert Mark(x[:0]) != Mark(x[:0])
    empty = Mark(x[:0])
    assert empty == empty
    del x
    assert mark != Mark(torch.randn(20, 8))  # though it may have got the same place


def test_a_survey_tells_what_is_run_in_which_order_and_what_is_shared() -> None:
    block = Block()
    survey = Survey(find_linears(block, "block"), 19)
    with torch.no_grad(), survey.watching(block, "block"):
        block(torch.randn(1, 19, 8))
    assert survey.moments == [[["block.left", "block.right"]], [["block.down"]]]
    assert not survey.again
    twice = Survey(find_linears(block, "block"), 19)
    block.twice = True
    with torch.no_grad(), twice.watching(block, "block"):
        block(torch.randn(1, 19, 8))
    assert twice.again
    assert sorted(name for moment in twice.moments for group in moment for name in group) == [
        "block.down", "block.left", "block.right",
    ]  # fmt: skip
    assert all(len(group) == 1 for moment in twice.moments for group in moment)


def test_experts_are_there_together_first_all_up_then_all_down(tmp_path: Path) -> None:
    checkpoint = Checkpoint(resolve(make("mixtral", tmp_path / "model")), "cpu")
    block = checkpoint.load_block(0).module
    survey = Survey([one for one in find_linears(block, "block") if one.expert is not None], 4)
    with torch.no_grad(), survey.watching(block, "block"):
        block.mlp(torch.randn(1, 4, 32))  # two experts a token: some may be reached by none
    up, down = survey.moments
    assert up == [[f"block.mlp.experts.{n}.gate_proj", f"block.mlp.experts.{n}.up_proj"] for n in range(4)]
    assert down == [[f"block.mlp.experts.{n}.down_proj"] for n in range(4)]


class Holding(nn.Module):
    """Holds a matrix over pairs of tokens, and other tensors, while its linear runs; and has let go of more by then."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        gone = x.repeat(1, 1, 50)
        more = gone[..., :16].clone()
        del gone
        pairs = x @ x.mT
        return self.linear(x) + more[..., :8] + pairs.sum()


def test_a_survey_tells_what_a_run_holds() -> None:
    block = Holding()
    survey = Survey(find_linears(block, "block"), 19)
    x = torch.randn(1, 19, 8)
    with torch.no_grad(), survey.watching(block, "block"):
        block(x)
    assert survey.held == Held(token=16 * 4, pair=4)
    assert survey.held.size(100) == 100 * 64 + 100 * 100 * 4
