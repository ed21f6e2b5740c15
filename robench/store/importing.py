"""Weights that others trained: state dicts become a run."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor, nn

from robench.core.data import at_hand, load, outline
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError, in_a_line
from robench.core.files import read_tensors
from robench.core.models import ModelSpec, build
from robench.core.rules import USUAL
from robench.store.normalisation import against, find, typed
from robench.store.runs import Role, Run, Runs, lineage, load_state
from robench.store.sources import refuse_page

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]
Values = tuple[float, ...]

_MEMBER = re.compile(r"(?:model|member|members\.|models\.)_?(\d+)\.(.+)")
#: Names of members' state dicts, side by side in one dict.
_NUMBERED = re.compile(r"(?:model|member|net|network|classifier|expert|m)?s?[_.-]?(\d+)")
#: Names of a normalisation: the last part of both.
_NORMALISATIONS = (("mean", "std"), ("mu", "sigma"))
#: What checkpoints hold beside tensors and can run no code: numbers of NumPy, the options of a script.
_HARMLESS: list[Any] = [np.dtype, np.ndarray, argparse.Namespace, type(np.dtype(np.float64)), type(np.dtype(np.int64))]


@dataclass(frozen=True)
class Read:
    """What a file holds.

    Attributes:
        states: a state dict per member; said: how the file was read, in words.
    """

    states: list[Weights]
    said: str


def read_states(path: Path, key: str | None = None) -> Read:
    """The members' state dicts in a file: safetensors, or a ``.pth`` that holds tensors and numbers alone.

    Understood: a state dict; one beside numbers, under any name; numbered ones side by side (the DVERGE authors'); and
    one flat dict whose names begin with ``model0.``, ``members.0.`` and so on.

    Args:
        key: which of several state dicts.

    Raises:
        RobenchError: absent, truncated, holding code instead of tensors, or several state dicts and no ``key``.
    """
    if not path.is_file():
        raise RobenchError(f"{path} does not exist or is not a file; expected .pth or .safetensors")
    refuse_page(path, str(path))
    content: Any = read_tensors(path)[0] if path.suffix == ".safetensors" else _unpickled(path)
    said = ""
    if key is not None:
        if not isinstance(content, Mapping) or not _is_state(content.get(key)):
            names = [str(name) for name, value in content.items() if _is_state(value)] if _mapping(content) else []
            raise RobenchError(
                f"{path} holds no state dict {key!r}; expected --key as one of: {', '.join(names) or '-'}"
            )
        content, said = content[key], f" under {key!r}"
    elif isinstance(content, Mapping):
        content, said = _inner(path, content)
    if isinstance(content, Mapping) and not content:
        raise RobenchError(f"{path} holds no weights; expected a state dict or a dict of state dicts")
    if not isinstance(content, Mapping):
        raise RobenchError(f"{path} holds a {type(content).__name__}, expected a state dict or a dict of state dicts")
    if all(_is_state(value) for value in content.values()):
        names = sorted(content, key=_natural)
        states = [_state(path, content[name]) for name in names]
        return Read(states, f"members {', '.join(map(str, names))}{said}")
    flat = _state(path, content)
    matches = {name: _MEMBER.fullmatch(name) for name in flat}
    if not all(matches.values()):
        return Read([flat], f"one member{said}")
    members: dict[int, Weights] = {}
    for name, match in matches.items():
        assert match is not None
        members.setdefault(int(match[1]), {})[match[2]] = flat[name]
    return Read([members[index] for index in sorted(members)], f"members {', '.join(map(str, sorted(members)))}{said}")


def _unpickled(path: Path) -> Any:
    if _is_torchscript(path):
        raise RobenchError(
            f"{path} is a TorchScript archive, which holds code: it is refused. Save its weights alone: "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth'), and name the network with --model"
        )
    try:
        scalar: Any = np.float64(0).__reduce__()[0]
        with torch.serialization.safe_globals([scalar, *_HARMLESS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RobenchError(
            f"{path} holds more than tensors, or is damaged: it is refused, as loading it could run code. Save its "
            f"state dict alone: torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # whatever a damaged file makes of its reader
        raise RobenchError(f"{path} is not a complete checkpoint ({in_a_line(error)}); copy it again") from error


def _is_torchscript(path: Path) -> bool:
    """Whether it is a zip file with compiled code beside the tensors."""
    with suppress(BadZipFile), ZipFile(path) as archive:
        return any(name.partition("/")[2].startswith("code/") for name in archive.namelist())
    return False


def _inner(path: Path, content: Mapping[Any, Any]) -> tuple[Any, str]:
    """The one thing in ``content`` that holds weights, and under which names."""
    said = ""
    while isinstance(content, Mapping) and not _is_state(content):
        found = {str(name): value for name, value in content.items() if _weights(value)}
        numbers = [_NUMBERED.fullmatch(name) for name in found]
        if len(found) > 1 and all(numbers) and all(_is_state(value) for value in found.values()):
            return found, said
        if len(found) > 1:
            raise RobenchError(
                f"{path} holds several state dicts: {', '.join(found)}; say which one: --key {next(iter(found))}"
            )
        if not found:
            break
        ((name, content),) = found.items()
        said += f" under {name!r}"
    return content, said


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _weights(value: Any) -> bool:
    """A state dict, or a dict of nothing but such; no optimizer's state."""
    return _is_state(value) or (isinstance(value, Mapping) and bool(value) and all(map(_weights, value.values())))


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
    key: str | None = None,
    normalisation: tuple[Values, Values] | None = None,
    rule: str = USUAL,
    whose: str = "as given",
    origins: Sequence[Mapping[str, str]] = (),
) -> Run:
    """A run from files of others: one file with several members, or one file each.

    Args:
        model: the members' architecture; dataset: whose classes they have.
        parent: the run that these weights were trained from.
        key: which of several state dicts in each file.
        normalisation: mean and standard deviation per channel; (0, …) and (1, …) for none. By default the file's own,
            or what `robench.store.normalisation.find` finds on the data.
        rule: how the ensemble decides, see `robench.core.rules`.
        whose: who says ``normalisation``, in words.
        origins: where each file is from (`robench.store.sources.FetchedWeights.origin`), for the manifest.

    Raises:
        RobenchError: unreadable files, weights that do not fit the architecture, a name that is taken, a normalisation
            that nothing tells.
    """
    states = _members(paths, key)
    name = runs.unused(name or re.sub(r"[^A-Za-z0-9._-]", "-", paths[0].stem))
    plain = _plain(model, dataset, data_folder)
    _refuse_other_channels(normalisation, plain.in_channels, dataset)
    networks, own = _networks(states, plain, paths[0].name)
    told = _normalisation(networks, own, normalisation, dataset, data_folder, whose)
    log.info(f"normalisation: {told[1]}")
    _doubt(networks, normalisation, dataset, data_folder)
    specs = [replace(plain, mean=mean, std=std) for mean, std in told[0]]
    return runs.save(
        name,
        _ensemble(specs, networks, rule),
        members=specs,
        defense={"name": defense},
        seed=seed,
        role=role,
        data=None,
        ancestors=lineage(parent) if parent else (),
        more={
            "imported": [path.name for path in paths],
            "sources": [dict(origin) for origin in origins],
            "dataset": None if ":" in dataset else dataset,
            "normalisation": told[1],
        },
    )


def _refuse_other_channels(given: tuple[Values, Values] | None, channels: int, dataset: str) -> None:
    if given is not None and any(len(values) != channels for values in given):
        got = " and ".join(_text(values) for values in given)
        raise RobenchError(
            f"expected --mean and --std of {channels} numbers, one a channel of {dataset}, got {got}; try "
            f"{typed(*(each[:1] * channels for each in given))}"
        )


def _members(paths: Sequence[Path], key: str | None) -> list[Weights]:
    """The state dicts in all files; how each was read is told."""
    states: list[Weights] = []
    for path in paths:
        read = read_states(path, key)
        log.info(f"{path.name}: {read.said}")
        states += read.states
    return states


def _doubt(networks: Sequence[nn.Module], given: tuple[Values, Values] | None, dataset: str, data_folder: Path) -> None:
    """Tells what a normalisation that was given makes right of data at hand, and which suits them clearly better."""
    if given is not None and (":" in dataset or at_hand(dataset, data_folder)):
        accuracy, doubt = against(networks, load(dataset, data_folder), given)
        log.info(accuracy)
        if doubt:
            log.warning(doubt)


def _ensemble(specs: Sequence[ModelSpec], networks: Sequence[nn.Module], rule: str) -> Ensemble:
    """Members with the weights of these networks, each behind its normalisation."""
    members = [build(spec, 0) for spec in specs]
    for member, network in zip(members, networks, strict=True):
        member.model.load_state_dict(network.state_dict())
    return Ensemble(members, rule).eval()


def _plain(model: str, dataset: str, data_folder: Path) -> ModelSpec:
    """The architecture for a data set, without a normalisation."""
    spec = outline(dataset, data_folder).model(model)
    return replace(spec, mean=(0.0,) * spec.in_channels, std=(1.0,) * spec.in_channels)


def _networks(
    states: Sequence[dict[str, Tensor]], spec: ModelSpec, file: str
) -> tuple[list[nn.Module], list[tuple[Values, Values] | None]]:
    """Networks of these weights, and the normalisation that each brings; RobenchError where two are the same."""
    networks: list[nn.Module] = []
    own: list[tuple[Values, Values] | None] = []
    for state in states:
        network = build(spec, 0).model
        weights, found = _split_normalisation(state, network, spec.in_channels)
        load_state(network, weights, file)
        for other, known in enumerate(networks, 1):
            if _same(network, known):
                raise RobenchError(
                    f"members {other} and {len(networks) + 1} have the same weights: an ensemble of copies is none; "
                    f"name each file once"
                )
        networks.append(network.eval())
        own.append(found)
    return networks, own


def _normalisation(
    networks: Sequence[nn.Module],
    own: Sequence[tuple[Values, Values] | None],
    given: tuple[Values, Values] | None,
    dataset: str,
    data_folder: Path,
    whose: str,
) -> tuple[list[tuple[Values, Values]], str]:
    """Mean and standard deviation of each member, and where they are from."""
    if given is not None:
        if any(each is not None and each != given for each in own):
            raise RobenchError("the weights bring a normalisation of their own; leave --mean and --std away")
        none = not any(given[0]) and all(value == 1 for value in given[1])
        told = "none" if none else f"mean {_text(given[0])}, std {_text(given[1])}"
        return [given] * len(own), f"{told}, {whose}"
    known = [each for each in own if each is not None]
    if len(known) == len(own):
        return known, f"the weights' own, mean {_text(known[0][0])}, std {_text(known[0][1])}"
    if known:
        raise RobenchError("some members bring a normalisation and others none; import them one by one, with --mean")
    if ":" not in dataset and not at_hand(dataset, data_folder):
        raise RobenchError(
            f"the weights do not say which normalisation they were trained with, and {dataset} is not at hand to try "
            f"some; say it: --mean R,G,B --std R,G,B, or --mean none, or --data-dir of the data"
        )
    mean, std, said = find(networks, load(dataset, data_folder))
    return [(mean, std)] * len(own), said


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _text(values: Values) -> str:
    return ",".join(f"{value:g}" for value in values)


def _state(path: Path, content: Mapping[Any, Any]) -> Weights:
    wrong = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise RobenchError(f"{path} holds {wrong[0]!r}, which is no tensor; expected a state dict")
    return {str(name): value for name, value in content.items()}


def _natural(name: Any) -> tuple[str, int]:
    match = re.search(r"\d+$", str(name))
    return (str(name)[: match.start()], int(match[0])) if match else (str(name), -1)


def _split_normalisation(
    state: Weights, network: nn.Module, channels: int
) -> tuple[Weights, tuple[Values, Values] | None]:
    """The network's own weights without wrappers' prefixes, and its normalisation, if it has one."""
    wanted = network.state_dict()
    state = dict(state)
    found = None
    for first, second in _NORMALISATIONS:
        for name in [each for each in state if each.rpartition(".")[2] == first and each not in wanted]:
            other = name[: len(name) - len(first)] + second
            if other in state and state[name].numel() == state[other].numel() == channels:
                # Of a float32 tensor the shortest decimal: .4914, not .49140000343.
                mean, std = (
                    tuple(round(value, 6) for value in state.pop(each).flatten().tolist()) for each in (name, other)
                )
                found = (mean, std)
    # What wraps a network leaves its mark on every name: ``module.``, ``_orig_mod.``, the ``1.`` of a Sequential.
    while not state.keys() & wanted.keys():
        heads = {name.partition(".")[0] for name in state if "." in name}
        if len(heads) != 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: value for name, value in state.items()}
    # Networks that were saved before torch 0.4.1 have not counted their batches.
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros_like(value))
    return state, found
