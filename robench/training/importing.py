"""Weights that others trained: state dicts become a run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robench.core.data import outline
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.models import ModelSpec, build
from robench.core.runs import Role, Run, Runs, lineage, load_state
from robench.core.store import checked_name, read_tensors

State = dict[str, Tensor]

_MEMBER = re.compile(r"(?:model|member|members\.|models\.)_?(\d+)\.(.+)")


def read_states(path: Path) -> list[State]:
    """The members' state dicts in a file: safetensors, or a ``.pth`` that holds tensors alone.

    Understood: a state dict; a dict of state dicts (the DVERGE authors'); either under ``state_dict`` or ``model``;
    and one flat dict whose names begin with ``model0.``, ``members.0.`` and so on.

    Raises:
        RobenchError: absent, truncated, or holding code instead of tensors.
    """
    if not path.is_file():
        raise RobenchError(f"{path} does not exist or is not a file; expected .pth or .safetensors")
    if path.suffix == ".safetensors":
        content: Any = read_tensors(path)[0]
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise RobenchError(
                f"{path} holds more than tensors, or is damaged: it is refused, as loading it could run code. Save its "
                f"state dict alone: torch.save(model.state_dict(), ...)"
            ) from error
        except Exception as error:  # whatever a damaged file makes of its reader
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RobenchError(f"{path} is not a complete checkpoint ({reason}); copy it again") from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise RobenchError(f"{path} holds a {type(content).__name__}, expected a state dict or a dict of state dicts")
    if all(isinstance(value, Mapping) for value in content.values()):
        return [_state(path, content[name]) for name in sorted(content, key=_natural)]
    flat = _state(path, content)
    matches = {name: _MEMBER.fullmatch(name) for name in flat}
    if not all(matches.values()):
        return [flat]
    members: dict[int, State] = {}
    for name, match in matches.items():
        assert match is not None
        members.setdefault(int(match[1]), {})[match[2]] = flat[name]
    return [members[index] for index in sorted(members)]


def import_weights(
    paths: Sequence[Path],
    runs: Runs,
    *,
    model: str,
    dataset: str,
    defense: str,
    seed: int,
    role: Role,
    name: str | None,
    parent: Run | None,
    data_folder: Path,
    trusted: bool = False,
) -> Run:
    """A run from files of others: one file with several members, or one file each.

    Args:
        model: the members' architecture; dataset: whose classes and, where a file has none of its own, whose
            normalisation they have.
        parent: the run that these weights were trained from.

    Raises:
        RobenchError: unreadable files, weights that do not fit the architecture, a name that is taken.
    """
    states = [state for path in paths for state in read_states(path)]
    name = checked_name(name or re.sub(r"[^A-Za-z0-9._-]", "-", paths[0].stem))
    if name in runs.names():
        raise RobenchError(f"run {name!r} exists; choose another with --name, or remove {runs.folder(name)}")
    facts = outline(dataset, data_folder)
    specs, members = [], []
    for state in states:
        weights, mean, std = _split_normalisation(state, facts.mean, facts.std)
        spec = ModelSpec(name=model, num_classes=facts.num_classes, in_channels=len(facts.mean), mean=mean, std=std)
        member = build(spec, 0, trusted=trusted)
        load_state(member.model, weights, paths[0].name)
        specs.append(spec)
        members.append(member)
    return runs.save(
        name,
        Ensemble(members).eval(),
        members=specs,
        defense={"name": defense},
        seed=seed,
        role=role,
        data=None,
        ancestors=lineage(parent) if parent else (),
        more={"imported": [path.name for path in paths], "dataset": dataset if ":" not in dataset else None},
    )


def _state(path: Path, content: Mapping[Any, Any]) -> State:
    wrong = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise RobenchError(f"{path} holds {wrong[0]!r}, which is no tensor; expected a state dict")
    return {str(name): value for name, value in content.items()}


def _natural(name: Any) -> tuple[str, int]:
    match = re.search(r"\d+$", str(name))
    return (str(name)[: match.start()], int(match[0])) if match else (str(name), -1)


def _split_normalisation(
    state: State, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[State, tuple[float, ...], tuple[float, ...]]:
    """The network's own weights without wrappers' prefixes, and its normalisation."""
    state = _without_prefix(state, "module.")
    own: dict[str, tuple[float, ...]] = {}
    for prefix in ("normalizer.", "normalize.", ""):
        if f"{prefix}mean" in state and f"{prefix}std" in state:
            for field in ("mean", "std"):
                # Of a float32 tensor the shortest decimal: .4914, not .49140000343.
                values = state.pop(f"{prefix}{field}").flatten().tolist()
                own[field] = tuple(round(value, 6) for value in values)
            break
    return _without_prefix(state, "model."), own.get("mean", mean), own.get("std", std)


def _without_prefix(state: State, prefix: str) -> State:
    if not all(name.startswith((prefix, "normaliz")) or name in ("mean", "std") for name in state):
        return dict(state)
    return {name.removeprefix(prefix): value for name, value in state.items()}
