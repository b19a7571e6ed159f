"""A model's config with other numbers in it, and its text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmprune.errors import UserError, first_line
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.quiet import quiet


def altered(checkpoint: Checkpoint, changes: Mapping[str, Any], what: str) -> tuple[Any, str]:
    """The config of a model, some values of whose decoder are others, and the same as the text of a config.json.

    Args:
        changes: values by transformers' names for them; what the family calls them is found out.
        what: what the model would have then, for messages.

    Raises:
        UserError: the config cannot say that.
    """
    source = checkpoint.source.folder / "config.json"
    written = source.read_text(encoding="utf-8") if checkpoint.shape is None else checkpoint.shape.config_json
    said: dict[str, Any] = json.loads(written)
    kind, text = type(checkpoint.model).__name__, checkpoint.config.get_text_config()
    part = said
    if text is not checkpoint.config:  # a decoder inside a larger model has a part of the config to itself
        subs = checkpoint.config.sub_configs
        name = next((name for name in subs if getattr(checkpoint.config, name, None) is text), None)
        if name is None:
            raise UserError(f"the config of {kind} does not say where that of its decoder is")
        part = said.setdefault(name, {})
    other = type(text).attribute_map
    for name, value in changes.items():
        own = other.get(name, name)  # as the family calls it; files may have any of the names
        names = {own, *(spelled for spelled, meant in other.items() if meant == own)}
        part.update(dict.fromkeys(names & part.keys() or {own}, value))
    try:
        with quiet():
            config = type(checkpoint.config).from_dict(_decoded(said))
        config._name_or_path = str(checkpoint.source.folder)  # where code that comes with the model is looked for
        return config, json.dumps(said, indent=2)
    except Exception as error:  # what is wrong in a config surfaces in many kinds, depending on the family
        raise UserError(f"{kind} cannot have {what}: {first_line(error)}") from None


def _decoded(said: Any) -> Any:
    """What a config.json says, with the numbers that JSON has not, which transformers writes as mappings."""
    if isinstance(said, dict):
        if said.keys() == {"__float__"}:
            return float(said["__float__"])
        return {key: _decoded(value) for key, value in said.items()}
    return [_decoded(value) for value in said] if isinstance(said, list) else said
