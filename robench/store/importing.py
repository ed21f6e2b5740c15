"""Weights that others trained: state dicts become a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from robench.core.data import Data, at_hand, load, outline
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.models import ModelSpec, build
from robench.core.rules import USUAL
from robench.store.normalisation import against, find, typed
from robench.store.runs import Role, Run, Runs, lineage, load_state
from robench.store.weights import Values, networks_in

log = logging.getLogger(__name__)


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
    name = runs.unused(name or re.sub(r"[^A-Za-z0-9._-]", "-", paths[0].stem))
    shown = outline(dataset, data_folder)
    plain = _plain(model, shown)
    _refuse_other_channels(normalisation, plain.in_channels, dataset)
    networks, own = _networks(paths, plain, key)
    used, said = _normalisation(networks, own, normalisation, dataset, data_folder, whose)
    log.info(f"normalisation: {said}")
    if normalisation or any(own):
        _doubt(networks, used, dataset, data_folder)
    specs = [replace(plain, mean=mean, std=std) for mean, std in used]
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
            "dataset": shown.label,
            "normalisation": said,
        },
    )


def _refuse_other_channels(given: tuple[Values, Values] | None, channels: int, dataset: str) -> None:
    if given is not None and any(len(values) != channels for values in given):
        got = " and ".join(_text(values) for values in given)
        raise RobenchError(
            f"expected --mean and --std of {channels} numbers, one a channel of {dataset}, got {got}; try "
            f"{typed(*(each[:1] * channels for each in given))}"
        )


def _doubt(
    networks: Sequence[nn.Module], used: Sequence[tuple[Values, Values]], dataset: str, data_folder: Path
) -> None:
    """Tells what a normalisation that nobody tried makes right of data at hand, and which suits them clearly better."""
    if ":" not in dataset and not at_hand(dataset, data_folder):
        return
    data = load(dataset, data_folder)
    for values in dict.fromkeys(used):
        theirs = [network for network, mine in zip(networks, used, strict=True) if mine == values]
        accuracy, doubt = against(theirs, data, values)
        log.info(accuracy)
        if doubt:
            log.warning(doubt)


def _ensemble(specs: Sequence[ModelSpec], networks: Sequence[nn.Module], rule: str) -> Ensemble:
    """Members with the weights of these networks, each behind its normalisation."""
    members = [build(spec, 0) for spec in specs]
    for member, network in zip(members, networks, strict=True):
        member.model.load_state_dict(network.state_dict())
    return Ensemble(members, rule).eval()


def _plain(model: str, data: Data) -> ModelSpec:
    """The architecture for a data set, without a normalisation."""
    spec = data.model(model)
    return replace(spec, mean=(0.0,) * spec.in_channels, std=(1.0,) * spec.in_channels)


def _networks(
    paths: Sequence[Path], spec: ModelSpec, key: str | None
) -> tuple[list[nn.Module], list[tuple[Values, Values] | None]]:
    """The networks in all files, and the normalisation that each brings; how each file was read is told.

    Raises:
        RobenchError: unreadable files, weights that do not fit, two members that are the same.
    """
    networks: list[nn.Module] = []
    own: list[tuple[Values, Values] | None] = []
    for path in paths:
        members = networks_in(path, build(spec, 0).model, spec.in_channels, key)
        names = [member.under for member in members]
        one = f"one member under {names[0]!r}" if names[0] else "one member"
        log.info(f"{path.name}: {one if len(names) == 1 else 'members ' + ', '.join(names)}")
        for member in members:
            network = build(spec, 0).model
            load_state(network, member.weights, path.name)
            for other, known in enumerate(networks, 1):
                if _same(network, known):
                    raise RobenchError(
                        f"members {other} and {len(networks) + 1} have the same weights: an ensemble of copies is "
                        f"none; name each file once"
                    )
            networks.append(network.eval())
            own.append(member.normalisation)
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
