"""What the system tells about memory, and what limits leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmprune import memory


def test_current_and_peak_follow_what_is_held() -> None:
    memory.give_back()  # what tests before this one have left
    before = memory.current()
    assert 0 < before <= memory.peak()
    held = torch.ones(2**26)
    assert memory.current() > before + 2**27
    assert memory.peak() > before + 2**27
    del held
    memory.give_back()  # which the C library does not by itself once it was set up for large tensors
    assert memory.current() < before + 2**27
    assert memory.peak() > before + 2**27
    memory.begin()
    assert before - 2**27 < memory.peak() < before + 2**27


def test_what_was_freed_in_pieces_is_given_back_where_too_much_is_held() -> None:
    memory.frugal()
    memory.give_back()
    before = memory.current()
    kept = []
    for _ in range(200):
        large = torch.ones(2**18)
        kept.append(torch.ones(2**10))  # stands behind it, so that the heap cannot shrink
        del large
        kept.append(torch.ones(2**18 + 2**12))
    del kept[1::4]
    held = memory.current()
    memory.ease()  # nobody has said how much is too much
    assert memory.current() > held - memory.LITTLE
    try:
        memory.ease_above(held + 2**20)
        memory.ease()
        assert memory.current() > held - memory.LITTLE
        memory.ease_above(held - 2**20)
        memory.ease()
        left = memory.current()
        assert left < held - 2**26  # about half of 200 MiB
        assert left > before + 2**26
        memory.ease_above(left - 2**20)
        memory.ease()  # all of it is in use
        more = torch.ones(2**21)
        memory.ease()  # and what is a little more is not looked at again
        assert memory._level is not None
        assert memory._level > left
        assert memory.current() >= left + 2**22
        del more
    finally:
        memory.ease_above(None)


def test_available_is_within_what_there_is() -> None:
    assert 2**20 < memory.available() < 2**50


def group(folder: Path, limit: str, current: int, **stat: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))


@pytest.fixture
def groups(tmp_path: Path) -> tuple[Path, Path]:
    """A tree of three groups below a root without files, and a process in the innermost."""
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    root.mkdir()
    group(root / "outer", "1000", 700, anon=500, inactive_file=60, active_file=40)
    group(root / "outer" / "middle", "max", 650, anon=500)
    group(root / "outer" / "middle" / "inner", "900", 600, anon=600)
    membership.write_text("12:cpu:/elsewhere\n0::/outer/middle/inner\n")
    return root, membership


def test_every_group_with_a_limit_tells_what_it_leaves(groups: tuple[Path, Path]) -> None:
    assert memory._left_by_limits(*groups) == [300, 400]


def test_a_container_that_sees_its_own_group_as_the_root(groups: tuple[Path, Path]) -> None:
    root, membership = groups
    group(root, "800", 100, inactive_file=1)
    membership.write_text("0::/\n")
    assert memory._left_by_limits(root, membership) == [701]


def test_without_groups_there_are_no_limits(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("1:memory:/old\n")
    assert memory._left_by_limits(tmp_path, tmp_path / "membership") == []
    assert memory._left_by_limits(tmp_path, tmp_path / "nowhere") == []


def test_a_group_that_is_half_there_takes_away_no_other(groups: tuple[Path, Path]) -> None:
    root, membership = groups
    (root / "outer" / "memory.stat").unlink()
    assert memory._left_by_limits(root, membership) == [300]


def test_available_counts_the_limits(groups: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    left = memory._left_by_limits
    monkeypatch.setattr(memory, "_left_by_limits", lambda: left(*groups))
    assert memory.available() == 300
