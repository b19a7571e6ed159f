"""What flows between two blocks comes back as it was put in, wherever it lies."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.errors import Failure
from llmprune.model.activations import Activations, Place, apart

PLACES: tuple[Place, ...] = ("host", "disk")


def held(place: Place, folder: Path, *batches: torch.Tensor) -> Activations:
    made = Activations(2, torch.device("cpu"), place, folder)
    for batch in batches:
        made.add(batch)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_round_trip(place: Place, dtype: torch.dtype, tmp_path: Path) -> None:
    batches = [torch.randn(count, 5, 7).to(dtype) for count in (3, 1, 1024)]  # the last is larger than a page
    kept = held(place, tmp_path, *batches)
    assert len(kept) == 3
    assert all(torch.equal(kept.read(number), batch) for number, batch in enumerate(batches))
    changed = [batch + 1 for batch in batches]
    for number, batch in enumerate(changed):
        kept.write(number, batch)
    assert all(torch.equal(kept.read(number), batch) for number, batch in enumerate(changed))


@pytest.mark.parametrize("place", PLACES)
def test_what_is_given_is_copied(place: Place, tmp_path: Path) -> None:
    given = torch.ones(2, 3, 4)
    kept = held(place, tmp_path, given)
    given.zero_()
    assert torch.equal(kept.read(0), torch.ones(2, 3, 4))
    kept.write(0, given)
    given.fill_(7)
    assert torch.equal(kept.read(0), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("place", PLACES)
def test_a_block_may_return_another_dtype(place: Place, tmp_path: Path) -> None:
    kept = held(place, tmp_path, *(torch.full((2, 3, 4), float(number)) for number in range(3)))
    for number, dtype in enumerate((torch.bfloat16, torch.float64, torch.float32)):
        kept.write(number, torch.full((2, 3, 4), number + 0.5, dtype=dtype))
    for number, dtype in enumerate((torch.bfloat16, torch.float64, torch.float32)):
        assert torch.equal(kept.read(number), torch.full((2, 3, 4), number + 0.5, dtype=dtype))


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_kept_as_nothing(place: Place, tmp_path: Path) -> None:
    kept = held(place, tmp_path, torch.ones(1, 2, 3), torch.empty(0, 2, 3), torch.ones(1, 2, 3))
    assert kept.read(1).shape == (0, 2, 3)
    kept.write(1, torch.empty(0, 2, 3))
    assert torch.equal(kept.read(2), torch.ones(1, 2, 3))


def test_the_file_has_no_name_and_outlives_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    kept = held("disk", folder, torch.arange(24.0).view(2, 3, 4))
    assert not list(folder.iterdir())
    folder.rmdir()
    kept.add(torch.ones(2, 3, 4))
    kept.write(0, torch.zeros(2, 3, 4))
    assert torch.equal(kept.read(0), torch.zeros(2, 3, 4))
    assert torch.equal(kept.read(1), torch.ones(2, 3, 4))


def test_a_tensor_that_was_read_stays_when_more_is_added(tmp_path: Path) -> None:
    kept = held("disk", tmp_path, torch.ones(2, 3, 4))
    first = kept.read(0)
    for _ in range(100):
        kept.add(torch.zeros(2, 3, 4))
    del kept
    assert torch.equal(first, torch.ones(2, 3, 4))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate here")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = held("disk", tmp_path, torch.ones(2, 3, 4))

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    kept.write(0, torch.zeros(2, 3, 4))  # what has its place needs no more
    with pytest.raises(Failure, match=rf"cannot be kept in {tmp_path}: No space left on device; make room there, or"):
        kept.add(torch.ones(2, 3, 4))


def test_a_rank_that_does_not_see_out_has_its_file_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = held("disk", tmp_path / "nowhere", torch.arange(24.0).view(2, 3, 4))
    assert torch.equal(kept.read(0), torch.arange(24.0).view(2, 3, 4))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(Failure, match=r"cannot be kept in .*/gone: No such file"):
        held("disk", tmp_path / "nowhere")


def test_without_posix_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    batches = [torch.randn(3, 5, 7), torch.randn(1024, 5, 7)]
    kept = held("disk", tmp_path, *batches)
    assert all(torch.equal(kept.read(number), batch) for number, batch in enumerate(batches))


def test_a_token_that_is_lost_does_not_stand_for_all() -> None:
    wanted = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [5.0, 0.0]]])
    found = torch.tensor([[[3.0, 3.0], [0.0, 2.0], [1.0, 300.0], [0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    far = apart(found, wanted)
    # One nearby, one as it should be, one with a massive activation, padding, and one of which nothing is left.
    assert far.item() == pytest.approx((1 / 25 + 0 + (1 + math.log(300**2)) + 0 + 1) / 5)
    far.backward()  # type: ignore[no-untyped-call]
    assert found.grad is not None
    assert torch.isfinite(found.grad).all()
    assert found.grad[0, 2].tolist() == pytest.approx([0, 2 / 300 / 5])  # it is still drawn back
    assert found.grad[0, 0].tolist() == pytest.approx([0, -2 / 25 / 5])
