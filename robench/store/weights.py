"""The networks in a file that somebody published, found by the names of their weights wherever these stand."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor, nn

from robench.core.errors import RobenchError, in_a_line
from robench.core.files import read_tensors
from robench.store.runs import load_state
from robench.store.sources import refuse_page

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]
Values = tuple[float, ...]

#: What numbered networks of one file are called where they are the members of an ensemble: epochs and seeds are not.
_MEMBERS = re.compile(
    r"(?:|m|ensemble|state_dicts?|(?:sub_?|base_?)?(?:model|member|net|network|classifier|expert|learner|estimator)s?)_?"
)
#: Names of a normalisation: the last part of both.
_NORMALISATIONS = (("mean", "std"), ("mu", "sigma"))
#: Parts of names that others use for the same layer of a residual network.
_SYNONYMS = {"linear": "fc", "classifier": "fc", "shortcut": "downsample"}
#: What checkpoints hold beside tensors and can run no code: numbers of NumPy, the options of a script.
_HARMLESS: list[Any] = [np.dtype, np.ndarray, argparse.Namespace, type(np.dtype(np.float64)), type(np.dtype(np.int64))]


@dataclass(frozen=True)
class FoundNetwork:
    """A network in a file.

    Attributes:
        under: what its names begin with there, without the last dot; "" for nothing.
        weights: its state dict.
        normalisation: mean and standard deviation per channel of pixels in [0, 1], where the file says them.
    """

    under: str
    weights: Weights
    normalisation: tuple[Values, Values] | None


def networks_in(path: Path, network: nn.Module, channels: int, key: str | None = None) -> list[FoundNetwork]:
    """The networks in a file that have every weight of ``network``, in the order of their numbers.

    They may stand alone or beside numbers, under any names, in a dict, a list, or in one dict with prefixes such as
    ``module.`` or ``models.0.``.

    Args:
        path: safetensors, or a ``.pth`` that holds tensors and numbers alone.
        channels: of the images, and so of a normalisation.
        key: what the names of the wanted networks begin with, where there are several.

    Raises:
        RobenchError: absent, truncated, holding code instead of tensors; no weights of ``network``; several networks
            that are not numbered members, and no ``key``.
    """
    dicts = dict(_dicts(_content(path)))
    if not dicts:
        raise RobenchError(f"{path} holds no weights; expected a state dict or a dict of state dicts")
    found: list[FoundNetwork] = []
    for under, tensors in dicts.items():
        found += _networks(path, under, tensors, network, channels)
    if not found:
        _refuse(path, dicts, network)
    chosen = [each for each in found if key is None or f"{each.under}.".startswith(f"{key}.")]
    names = ", ".join(each.under or "-" for each in found)
    if not chosen:
        raise RobenchError(f"{path} holds no state dict {key!r} of this network; expected --key as one of: {names}")
    if len(chosen) > 1:
        numbers = _numbers([each.under for each in chosen])
        if numbers is None:
            raise RobenchError(
                f"{path} holds several state dicts: {names}; say which one: --key {chosen[0].under or chosen[1].under}"
            )
        chosen = [each for _, each in sorted(zip(numbers, chosen, strict=True), key=lambda pair: pair[0])]
    return chosen


def _content(path: Path) -> Any:
    if not path.is_file():
        raise RobenchError(f"{path} does not exist or is not a file; expected .pth or .safetensors")
    refuse_page(path, str(path))
    return read_tensors(path)[0] if path.suffix == ".safetensors" else _unpickled(path)


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
        raise RobenchError(
            f"{path} is not a complete checkpoint of torch ({in_a_line(error)}); copy it again, or save the weights "
            f"with torch.save(model.state_dict(), ...)"
        ) from error


def _is_torchscript(path: Path) -> bool:
    """Whether it is a zip file with compiled code beside the tensors."""
    with suppress(BadZipFile), ZipFile(path) as archive:
        return any(name.partition("/")[2].startswith("code/") for name in archive.namelist())
    return False


def _dicts(content: Any, under: tuple[str, ...] = ()) -> Iterator[tuple[str, Weights]]:
    """Everything in a checkpoint that holds tensors, and the names that lead there, with dots."""
    if isinstance(content, Mapping):
        items = [(str(name), value) for name, value in content.items()]
    elif isinstance(content, (list, tuple)):
        items = [(str(index), value) for index, value in enumerate(content)]
    else:
        return
    if tensors := {name: value for name, value in items if isinstance(value, Tensor)}:
        yield ".".join(under), tensors
    for name, value in items:
        yield from _dicts(value, (*under, name))


def _networks(path: Path, under: str, tensors: Weights, network: nn.Module, channels: int) -> list[FoundNetwork]:
    """The networks in one state dict, each with its normalisation; what belongs to neither is told and left out."""
    tensors = _renamed(tensors, network)
    prefixes = _prefixes(tensors, network)
    if not prefixes:
        return []
    own = {prefix + name for prefix in prefixes for name in network.state_dict()}
    pairs = _normalisations(path, {name: value for name, value in tensors.items() if name not in own}, channels)
    for place, (names, _) in pairs.items():
        for name in names:
            del tensors[place + name]
    found = []
    for prefix in sorted(prefixes, key=len, reverse=True):
        weights = {name.removeprefix(prefix): tensors.pop(name) for name in sorted(tensors) if name.startswith(prefix)}
        near = [place for place in pairs if prefix.startswith(_parent(place))]
        nearest = max(near, key=lambda place: _shared(place, prefix), default=None)
        found.append(
            FoundNetwork(
                ".".join(filter(None, (under, prefix.rstrip(".")))),
                _counted(weights, network),
                None if nearest is None else pairs[nearest][1],
            )
        )
    if tensors:
        log.warning(
            f"{path.name}: left out {', '.join(sorted(tensors)[:3])} ({len(tensors)} in all), which the network "
            f"does not have; if outputs depend on it, name a network that has it: --model package.module:factory"
        )
    return found


def _renamed(tensors: Weights, network: nn.Module) -> Weights:
    """The same tensors, with the network's words for layers that others call otherwise."""
    ours = {part for name in network.state_dict() for part in name.split(".")}
    theirs = {part for name in tensors for part in name.split(".")}
    words = {their: our for their, our in _SYNONYMS.items() if their in theirs - ours and our in ours - theirs}
    return {".".join(words.get(part, part) for part in name.split(".")): value for name, value in tensors.items()}


def _prefixes(names: Collection[str], network: nn.Module) -> list[str]:
    """What stands before every name of the network: "", or something that ends with a dot."""
    wanted = [name for name in network.state_dict() if not _counts(name)]
    ends = re.compile(rf"(|.*\.){re.escape(wanted[0])}")
    heads = [match[1] for name in names if (match := ends.fullmatch(name))]
    return [head for head in heads if all(head + name in names for name in wanted)]


def _normalisations(
    path: Path, tensors: Weights, channels: int
) -> dict[str, tuple[tuple[str, str], tuple[Values, Values]]]:
    """Where a normalisation stands, what its two parts are called there, and its values in pixels of [0, 1]."""
    found = {}
    for names in _NORMALISATIONS:
        for place in [name.removesuffix(names[0]) for name in tensors if name.rpartition(".")[2] == names[0]]:
            both = [tensors.get(place + name) for name in names]
            if any(each is None or each.numel() != channels for each in both):
                continue
            # Of a float32 tensor the shortest decimal: .4914, not .49140000343.
            mean, std = (
                tuple(round(value, 6) for value in each.flatten().tolist()) for each in both if each is not None
            )
            if max(*mean, *std) > 1:
                mean, std = (tuple(round(value / 255, 6) for value in each) for each in (mean, std))
                log.info(f"{path.name}: its normalisation is of pixels in [0, 255]; it is divided by 255")
            found[place] = names, (mean, std)
    return found


def _shared(one: str, other: str) -> int:
    """How many of their first parts two names have in common."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _parent(place: str) -> str:
    """``a.b.`` of ``a.b.c.``: where the module stands that has one called ``c``."""
    return place.rstrip(".").rpartition(".")[0] + "." if "." in place.rstrip(".") else ""


def _counts(name: str) -> bool:
    """Whether it is BatchNorm's count of batches, which networks that were saved before torch 0.4.1 lack."""
    return name.endswith("num_batches_tracked")


def _counted(weights: Weights, network: nn.Module) -> Weights:
    missing = [name for name in network.state_dict() if _counts(name) and name not in weights]
    return {**weights, **{name: torch.zeros((), dtype=torch.long) for name in missing}}


def _numbers(names: Sequence[str]) -> list[int] | None:
    """The numbers by which these names differ, if they are all that differs and members of ensembles are called so."""
    parts = [name.split(".") for name in names]
    if len({len(each) for each in parts}) > 1:
        return None
    differ = [at for at, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    if len(differ) > 1:
        return None
    (at,) = differ
    matches = [match for each in parts if (match := re.fullmatch(r"(.*?)[_-]?(\d+)", each[at]))]
    # Of ``models.0`` the word stands in the part before the number.
    words = {match[1] or (parts[0][at - 1] if at else "") for match in matches}
    if len(matches) < len(parts) or len(words) > 1 or not _MEMBERS.fullmatch(words.pop()):
        return None
    return [int(match[2]) for match in matches]


def _refuse(path: Path, dicts: Mapping[str, Weights], network: nn.Module) -> NoReturn:
    """Says what the likeliest of these state dicts lacks, or has too many."""
    likely: Counter[tuple[str, str]] = Counter()
    for under, tensors in dicts.items():
        for name in _renamed(tensors, network):
            for wanted in network.state_dict():
                if name == wanted or name.endswith(f".{wanted}"):
                    likely[under, name.removesuffix(wanted)] += 1
    ((under, prefix), count), *_ = *likely.most_common(1), (("", ""), 0)
    if 2 * count < len(network.state_dict()):
        under, prefix = max(dicts, key=lambda under: len(dicts[under])), ""
    tensors = _renamed(dicts[under], network)
    load_state(
        network, {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}, path.name
    )
    raise AssertionError("what fits would have been found")
