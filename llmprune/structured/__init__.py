"""Smaller dense models: what is left out of them, and how that is chosen."""
