"""Defenses: one file each. `DEFENSES` finds them."""

from robench.defenses.base import DEFENSES, Batch, Defense, Terms

__all__ = ["DEFENSES", "Batch", "Defense", "Terms"]
