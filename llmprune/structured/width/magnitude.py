"""Magnitude: those units go whose weights are the smallest."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.solvers import magnitude


@dataclass(frozen=True)
class Solver(magnitude.Solver):
    """A unit's saliency is Σ|W_ij| over all rows i and its inputs j; weights are not updated."""
