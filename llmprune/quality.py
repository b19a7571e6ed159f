"""Presets: `fast`, `balanced` and `best` are short for methods, what follows them, and what they aim at."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llmprune.errors import unknown

_NONE: Mapping[str, Any] = MappingProxyType(
    {"permute": False, "refine": [], "reconstruct": [], "calibration.asymmetric": None}
)

QUALITIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": MappingProxyType({"method": "wanda", **_NONE}),
        "balanced": MappingProxyType(
            {"method": "wanda", **_NONE, "reconstruct": [{"name": "cg", "steps": 12}], "calibration.asymmetric": 0.5}
        ),
        "best": MappingProxyType(
            {
                "method": "wanda",
                **_NONE,
                "permute": "auto",
                "reconstruct": ["cg", "block"],
                "calibration.asymmetric": 0.5,
            }
        ),
    }
)
"""What each stands for, as recipe keys. Measured in the README."""


def keys_of(quality: str) -> Mapping[str, Any]:
    """The recipe keys that a preset stands for.

    Raises:
        UserError: there is no such preset.
    """
    if quality not in QUALITIES:
        raise unknown("quality", quality, QUALITIES)
    return QUALITIES[quality]
