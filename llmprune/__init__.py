"""Prune language models: any Hugging Face decoder in, a plain sparse checkpoint out."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from llmprune.errors import Failure, LLMPruneError, UserError

if TYPE_CHECKING:
    from llmprune.course import run
    from llmprune.evaluate.compare import compare
    from llmprune.evaluate.divergence import divergence
    from llmprune.evaluate.perplexity import perplexity
    from llmprune.evaluate.speed import speed
    from llmprune.pipeline import prune
    from llmprune.push import push
    from llmprune.recipe import Recipe
    from llmprune.report.inspect import inspect
    from llmprune.report.record import Report
    from llmprune.report.verify import verify
    from llmprune.search import search
    from llmprune.sweep import sweep

__version__ = "0.1.0"

__all__ = [
    "Failure",
    "LLMPruneError",
    "Recipe",
    "Report",
    "UserError",
    "__version__",
    "compare",
    "divergence",
    "inspect",
    "perplexity",
    "prune",
    "push",
    "run",
    "search",
    "speed",
    "sweep",
    "verify",
]

_PLACES = {
    "Recipe": "llmprune.recipe",
    "Report": "llmprune.report.record",
    "compare": "llmprune.evaluate.compare",
    "divergence": "llmprune.evaluate.divergence",
    "inspect": "llmprune.report.inspect",
    "perplexity": "llmprune.evaluate.perplexity",
    "prune": "llmprune.pipeline",
    "push": "llmprune.push",
    "run": "llmprune.course",
    "search": "llmprune.search",
    "speed": "llmprune.evaluate.speed",
    "sweep": "llmprune.sweep",
    "verify": "llmprune.report.verify",
}


def __getattr__(name: str) -> object:
    # torch and transformers are imported when they are needed: `llmprune --help` answers at once.
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'llmprune' has no attribute {name!r}")


class _Package(ModuleType):
    """A package whose functions are not hidden by the modules of the same name, once these are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
