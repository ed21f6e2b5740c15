"""Who is attacked, and from whom: models with an identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.runs import Run, member_hashes
from robench.core.store import content_key, tensors_hash


@dataclass(frozen=True)
class Subject:
    """An ensemble under evaluation, or a surrogate.

    Attributes:
        ensemble: the original weights, float32, eval mode, on the device where verdicts are taken.
        identity: hash of architecture and weights; keys of cells hold it.
        members: hash of each member's weights.
        ancestors: hashes (ensembles' and members') of everything that the weights were trained from.
    """

    name: str
    ensemble: Ensemble
    identity: str
    members: tuple[str, ...]
    defense: str = "unknown"
    seed: int = 0
    ancestors: frozenset[str] = field(default_factory=frozenset)

    @property
    def n(self) -> int:
        return len(self.ensemble)

    @classmethod
    def of_run(cls, run: Run, device: torch.device, *, trusted: bool = False) -> Subject:
        ancestors = {value for entry in run.manifest["ancestors"] for value in (entry["weights"], *entry["members"])}
        return cls(
            run.name,
            run.load(trusted=trusted).to(device),
            run.identity,
            tuple(run.manifest["member_weights"]),
            run.defense,
            run.seed,
            frozenset(ancestors),
        )

    @classmethod
    def of_model(
        cls,
        model: nn.Module | Sequence[nn.Module],
        device: torch.device,
        *,
        name: str = "model",
        defense: str = "unknown",
        seed: int = 0,
    ) -> Subject:
        """A user's own module, ensemble, or list of member modules: images in [0, 1] -> logits.

        The modules are used as they are, moved to ``device`` and set to eval mode for the time of a call only.
        """
        if isinstance(model, Ensemble):
            ensemble = model
        elif isinstance(model, nn.Module):
            ensemble = Ensemble([model])
        else:
            members = list(model)
            if not all(isinstance(member, nn.Module) for member in members):
                raise RobenchError("expected `model` to be an nn.Module or a list of them")
            ensemble = Ensemble(members)
        ensemble = ensemble.to(device)
        identity = content_key({"weights": tensors_hash(ensemble.state_dict()), "models": repr(ensemble)})
        return cls(name, ensemble, identity, tuple(member_hashes(ensemble)), defense, seed)


def kinship(surrogate: Subject, target: Subject, threshold: float = 0.2) -> str | None:
    """Why a surrogate is no hold-out for a target, or None.

    Shared weights and shared ancestors are read off hashes. Where ancestry was not recorded it still shows: trained
    from one another, networks keep a cosine of about .5 between their weights, while independent ones have about 0.

    Args:
        threshold: cosine of all convolution and linear weights of two members of one architecture.
    """
    if set(surrogate.members) & set(target.members):
        return f"{surrogate.name} and {target.name} share a member"
    own = {surrogate.identity, *surrogate.members}
    if set(surrogate.members) & target.ancestors:
        return f"{surrogate.name} is an ancestor of {target.name}"
    if set(target.members) & surrogate.ancestors:
        return f"{target.name} is an ancestor of {surrogate.name}"
    if (surrogate.ancestors & target.ancestors) - own:
        return f"{surrogate.name} and {target.name} have an ancestor in common"
    for i, mine in enumerate(surrogate.ensemble.members, 1):
        for j, theirs in enumerate(target.ensemble.members, 1):
            cosine = _cosine(mine, theirs)
            if cosine > threshold:
                return (
                    f"member {i} of {surrogate.name} and member {j} of {target.name} have weights of cosine "
                    f"{cosine:.2f}: one was trained from the other, or both from a third"
                )
    return None


def _cosine(first: nn.Module, second: nn.Module) -> float:
    """Cosine between the centred weights of two modules; 0 where their architectures differ, however wrapped."""
    weights = [[value.detach() for value in module.parameters() if value.ndim >= 2] for module in (first, second)]
    shapes = [[value.shape for value in each] for each in weights]
    if shapes[0] != shapes[1] or not shapes[0]:
        return 0.0
    # Each tensor counts the same: the last layer's common sign pattern must not decide.
    cosines = [
        torch.cosine_similarity((value - value.mean()).flatten(), (other - other.mean()).flatten(), dim=0)
        for value, other in zip(*weights, strict=True)
    ]
    return float(torch.stack(cosines).mean())
