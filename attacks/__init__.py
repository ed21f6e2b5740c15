"""Attacks: one file each. `ATTACKS` finds them."""

from robench.attacks.base import ATTACKS, Attack, Crafted

__all__ = ["ATTACKS", "Attack", "Crafted"]
