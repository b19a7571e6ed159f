"""Wanda: those units go whose weights times the norms of what flows through them are the smallest."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.solvers import wanda


@dataclass(frozen=True)
class Solver(wanda.Solver):
    """A unit's saliency is Σ|W_ij|·‖X_j‖₂ over all rows and its inputs; no updates (Wanda-sp of arXiv:2312.11983)."""
