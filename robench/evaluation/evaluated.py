"""Who is attacked, and from whom: models with an identity."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError, in_a_line
from robench.core.files import content_key, tensors_hash
from robench.store.runs import Run, member_hashes


@dataclass(frozen=True)
class EvaluatedModel:
    """An ensemble under evaluation, or a surrogate.

    Attributes:
        ensemble: the original weights, float32, eval mode, on the device where verdicts are taken.
        identity: hash of architecture and weights; keys of cells hold it.
        members: hash of each member's weights.
        ancestors: hashes (ensembles' and members') of everything that the weights were trained from.
        trained: False for a stand-in of a run that is missing, of which nothing but its size is known.
    """

    name: str
    ensemble: Ensemble
    identity: str
    members: tuple[str, ...]
    defense: str = "unknown"
    seed: int = 0
    ancestors: frozenset[str] = field(default_factory=frozenset)
    trained: bool = True

    @property
    def n(self) -> int:
        return len(self.ensemble)

    @classmethod
    def of_run(cls, run: Run, device: torch.device) -> EvaluatedModel:
        ancestors = {value for entry in run.manifest["ancestors"] for value in (entry["weights"], *entry["members"])}
        return cls(
            run.name,
            run.load().to(device),
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
    ) -> EvaluatedModel:
        """A user's own module, ensemble, or list of member modules: images in [0, 1] -> logits.

        The modules are used as they are, set to eval mode for the time of a call only; where they are on another
        device, a copy of them. Of one that went through torch.compile, what went in is used.

        Raises:
            RobenchError: no modules, one whose weights are not made yet, or one that cannot be copied, as every attack
                works on a copy.
        """
        model = _uncompiled(model) if isinstance(model, nn.Module) else model
        if isinstance(model, Ensemble):
            ensemble = model
        elif isinstance(model, nn.Module):
            ensemble = Ensemble([model])
        else:
            members = list(model)
            if not all(isinstance(member, nn.Module) for member in members):
                raise RobenchError("expected `model` to be an nn.Module or a list of them")
            ensemble = Ensemble(map(_uncompiled, members))
        if unmade := [name for name, value in ensemble.named_parameters() if is_lazy(value)]:
            raise RobenchError(
                f"{name} has weights that its first batch makes, {unmade[0]!r}; call it once, on a batch of images"
            )
        try:
            copied = copy.deepcopy(ensemble)
        except Exception as error:  # whatever a user's module may raise
            raise RobenchError(
                f"{name} cannot be copied, and every attack works on a copy ({in_a_line(error)}); keep no "
                f"tensor with a graph, lock or open file in it"
            ) from error
        if any(weight.device != device for weight in ensemble.parameters()):
            ensemble = copied.to(device)
        # Weights and printed modules may be those of another function: of another temperature, say.
        attributes = {
            path: [type(module).__qualname__, *sorted((k, repr(v)) for k, v in vars(module).items() if _plain(v))]
            for path, module in ensemble.named_modules()
        }
        identity = content_key(
            {"weights": tensors_hash(ensemble.state_dict()), "models": repr(ensemble), "attributes": attributes}
        )
        return cls(name, ensemble, identity, tuple(member_hashes(ensemble)), defense, seed)


def _plain(value: object) -> bool:
    return isinstance(value, int | float | str | tuple)


def _uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile was given, where it was; its wrapper hides modules from hooks."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def kinship(surrogate: EvaluatedModel, target: EvaluatedModel, threshold: float = 0.2) -> str | None:
    """Why a surrogate is no hold-out for a target, or None.

    Shared weights and shared ancestors are read off hashes. Where ancestry was not recorded it still shows: trained
    from one another, networks keep a cosine of about .5 between their weights, while independent ones have about 0. Two
    members are kin where this holds of more than half of their layers, whatever else they have.

    Args:
        threshold: cosine of two convolution or linear weights, beyond which they are the same layer.
    """
    if set(surrogate.members) & set(target.members):
        return f"{surrogate.name} and {target.name} share a member"
    itself = {surrogate.identity, *surrogate.members}
    if set(surrogate.members) & target.ancestors:
        return f"{surrogate.name} is an ancestor of {target.name}"
    if set(target.members) & surrogate.ancestors:
        return f"{target.name} is an ancestor of {surrogate.name}"
    if (surrogate.ancestors & target.ancestors) - itself:
        return f"{surrogate.name} and {target.name} have an ancestor in common"
    own, others = ([_layers(member) for member in each.ensemble.members] for each in (surrogate, target))
    for i, mine in enumerate(own, 1):
        for j, theirs in enumerate(others, 1):
            cosines = _cosines(mine, theirs)
            alike = sum(cosine > threshold for cosine in cosines)
            if 2 * alike > len(cosines):
                return (
                    f"member {i} of {surrogate.name} and member {j} of {target.name} have {alike} of {len(cosines)} "
                    f"layers in common, with weights of cosine {statistics.median(cosines):.2f}: one was trained from "
                    f"the other, or both from a third"
                )
    return None


def _layers(module: nn.Module) -> dict[torch.Size, Tensor]:
    """By shape, the weights of all convolution and linear layers, centred and of length 1, (layers, numbers)."""
    found: dict[torch.Size, list[Tensor]] = {}
    for value in module.parameters():
        if value.ndim >= 2:
            flat = value.detach().flatten().float()
            found.setdefault(value.shape, []).append(F.normalize(flat - flat.mean(), dim=0))
    return {shape: torch.stack(layers) for shape, layers in found.items()}


def _cosines(first: dict[torch.Size, Tensor], second: dict[torch.Size, Tensor]) -> list[float]:
    """Per layer of the network that has fewer, its cosine with the layer of the other that is most like it; 0 where
    none is of its shape. So neither a head of its own nor the order of layers hides a body in common."""
    fewer, more = sorted((first, second), key=lambda layers: sum(map(len, layers.values())))
    found: list[float] = []
    for shape, layers in fewer.items():
        others = more.get(shape)
        found += [0.0] * len(layers) if others is None else (layers @ others.T.to(layers)).amax(dim=1).tolist()
    return found
