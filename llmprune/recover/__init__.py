"""Training after and with pruning: zeros stay zeros, or come in the course of it."""

from __future__ import annotations

from llmprune.recover.gradual import GradualPruning
from llmprune.recover.keep import KeepZeros
from llmprune.recover.options import Training
from llmprune.recover.run import Recovered, recover

__all__ = ["GradualPruning", "KeepZeros", "Recovered", "Training", "recover"]
