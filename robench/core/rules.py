"""How an ensemble decides, by name. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

from robench.core.errors import unknown

#: ``softmax``: the mean of the members' probabilities. ``logits``: the mean of their logits. ``confidence``: the member
#: that is surest. ``vote``: most members; where these are as many, the probable of theirs. ``random``: a member drawn
#: for each image, keyed by the image, so that a verdict can be made again.
Rule = Literal["softmax", "logits", "confidence", "vote", "random"]

RULES: tuple[Rule, ...] = get_args(Rule)
USUAL: Rule = "softmax"

#: What attacks follow where a rule has no gradient, as rows call it. ``soft-votes``: the mean of the probabilities of
#: members whose two highest logits are brought to a distance of 1. ``expectation``: the mean over draws, log p̄.
STAND_INS: dict[Rule, str] = {"vote": "soft-votes", "random": "expectation"}


def checked(rule: str) -> Rule:
    """``rule``; RobenchError where there is none of that name."""
    for each in RULES:
        if rule == each:
            return each
    raise unknown("rule", rule, RULES)


def label(attack: str, rule: Rule) -> str:
    """An attack's label in the rows of an ensemble of that rule: it says what is followed where that is a stand-in."""
    return f"{attack}:follows={STAND_INS[rule]}" if rule in STAND_INS else attack
