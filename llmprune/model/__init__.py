"""The only rooms that know transformers' internals: where a model comes from, how its blocks are walked and written."""
