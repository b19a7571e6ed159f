"""What is told of the runs of llmprune that had made the model which a run begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.model.source import Source
from llmprune.report.record import Report, short_name, smaller

_CARRIED = (
    *("llmprune", "model", "revision", "origin", "base", "recipe", "calibration", "weights", "dense_weights"),
    *("sparsity", "model_sparsity", "kept_blocks", "dense_blocks", "widths", "hidden_channels", "recovery", "versions"),
)
"""What a run's report keeps of the runs before it."""


def earlier_runs(begun: Report | None, files: Mapping[str, str]) -> list[dict[str, Any]]:
    """`Report.earlier` of a run, by the report of the run that made its model.

    Args:
        files: the sha256 of what lies in the model's folder now, by name.
    """
    if begun is None:
        return []
    data = begun.to_dict()
    changed = any(files.get(name) != sha256 for name, sha256 in begun.shards.items())
    return [*begun.earlier, {**{key: data[key] for key in _CARRIED}, "changed": changed}]


def base_of(source: Source, begun: Report | None) -> dict[str, Any]:
    """`Report.base` of a run: what the model's card says, and what that lacks, as the run that made it knew it."""
    known = begun.base if begun is not None else {}
    licence = "license" in source.base  # which goes with a name and a link of its own, or has none
    return {**{key: told for key, told in known.items() if not (licence and key.startswith("license"))}, **source.base}


def all_runs(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those before a run, the first first, and that run, by its llmprune.json."""
    return [*(report.get("earlier") or ()), report]


def beginning(earlier: Sequence[Mapping[str, Any]]) -> str:
    """What earlier runs had made of a model that is called dense since, as a sentence."""
    made = (f"of {'that' if number else short_name(run['model'])} {_left(run)}" for number, run in enumerate(earlier))
    return f"What is called dense here had been pruned before: {'; '.join(made)}."


def _left(run: Mapping[str, Any]) -> str:
    """What a run left of its model, in words."""
    share = f": {run['weights'] / run['dense_weights']:.2%} of the weights" if run["dense_weights"] else ""
    parts = [f"{told}{share}"] if (told := smaller(run)) else []
    if run["sparsity"] or not parts:
        parts.append(f"{run['sparsity']:.2%} zeros in the pruned linears")
    parts += ["trained after that"] if run["recovery"] else []
    parts += ["changed after that by something else"] if run["changed"] else []
    return ", ".join(parts)
