"""Runs: a folder each, with a manifest, weights and, beside them, what was measured on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.files import (
    Damaged,
    checked_name,
    content_key,
    read_record,
    read_tensors,
    tensors_hash,
    write_record,
    write_tensors,
)
from robench.core.models import ModelSpec, build
from robench.core.rules import USUAL, Rule
from robench.store.claims import Claims
from robench.store.names import RunNames
from robench.store.provenance import versions

Role = Literal["target", "surrogate"]

FORMAT = 1


class Ancestor(BaseModel):
    """A run that weights come from."""

    run: str
    weights: str
    members: list[str]


class Manifest(BaseModel):
    """What the manifest of a run must hold; whoever made the run may say more."""

    model_config = ConfigDict(strict=True)

    defense: dict[str, Any]
    seed: int
    role: Role
    members: Annotated[list[dict[str, Any]], Field(min_length=1)]
    weights: str
    member_weights: list[str]
    data: dict[str, str] | None
    ancestors: list[Ancestor]
    key: str | None
    rule: Rule = USUAL
    history: list[dict[str, Any]] = []

    @field_validator("defense")
    @classmethod
    def _named(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("name"), str):
            raise ValueError("expected the defense's `name`")
        return value


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        manifest: what `record` wrote.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def defense(self) -> str:
        return str(self.manifest["defense"]["name"])

    @property
    def fields(self) -> dict[str, Any]:
        """The settings of its defense."""
        return {key: value for key, value in self.manifest["defense"].items() if key not in ("name", "version")}

    @property
    def n(self) -> int:
        return len(self.manifest["members"])

    @property
    def seed(self) -> int:
        return int(self.manifest["seed"])

    @property
    def role(self) -> str:
        return str(self.manifest["role"])

    @property
    def dataset(self) -> str:
        """What it was made for, by the name that `robench.core.data.load` takes where it has one; may be empty."""
        told = self.manifest["data"] or {}
        return str(told.get("source") or told.get("name") or self.manifest.get("dataset") or "")

    @property
    def data_name(self) -> str:
        """What its manifest calls the data that it was made for; may be empty."""
        return str((self.manifest["data"] or {}).get("name") or self.manifest.get("dataset") or "")

    @property
    def rule(self) -> Rule:
        """How the ensemble decides; the usual rule is not written down."""
        rule: Rule = self.manifest.get("rule", USUAL)
        return rule

    @property
    def weights(self) -> str:
        """SHA-256 of the weights by content."""
        return str(self.manifest["weights"])

    @property
    def identity(self) -> str:
        """Hash of architecture, weights and rule: what cells say of whom they judged."""
        models = [spec.manifest() for spec in self.specs]
        return content_key({"weights": self.weights, "models": models, **_unusual(self.rule)})

    @property
    def specs(self) -> list[ModelSpec]:
        return [ModelSpec.of(values) for values in self.manifest["members"]]

    @property
    def training(self) -> dict[str, str]:
        """What beside its defense the weights came of, in words: members and rule; data, seed, start and every field of
        the recipe, where they were trained here."""
        members = ", ".join(sorted({str(spec["name"]) for spec in self.manifest["members"]}))
        told = {"members": f"{self.n} x {members}", "rule": str(self.rule)}
        if not (recipe := self.manifest.get("recipe")):
            return told
        return {
            **told,
            "data": str((self.manifest["data"] or {}).get("fingerprint", ""))[:8],
            "seed": str(self.seed),
            "start": next((str(each["run"]) for each in self.manifest["ancestors"]), "from scratch"),
            **{name: str(value) for name, value in recipe.items()},
        }

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name; RobenchError where they are absent, damaged, or not those that the manifest names."""
        tensors, _ = read_tensors(self.folder / "weights.safetensors")
        if tensors_hash(tensors) != self.weights:
            raise Damaged(
                f"the weights of run {self.name!r} are not those that its manifest names",
                f"restore them, or remove {self.folder} and train or import again",
            )
        return tensors

    def load(self) -> Ensemble:
        """The ensemble, in eval mode on the CPU.

        Raises:
            RobenchError: weights that are absent, damaged, or not those that the manifest names.
        """
        tensors = self.tensors()
        ensemble = Ensemble((build(spec, 0) for spec in self.specs), self.rule)
        load_state(ensemble, tensors, self.name)
        return ensemble.eval()


class Runs(RunNames):
    """The folder that holds all runs."""

    def claims(self) -> Claims:
        """Who trains and judges what, among all processes that work on these runs."""
        return Claims(self.root / ".claims")

    def get(self, name: str) -> Run:
        """A finished run; RobenchError where there is none of that name."""
        path = self.manifest(name)
        manifest = read_record(path)
        if manifest.get("format") != FORMAT:
            raise Damaged(f"{path} is not a manifest of format {FORMAT}", "train or import the run again")
        required = {name for name, about in Manifest.model_fields.items() if about.is_required()}
        missing = sorted(required - manifest.keys())
        if missing:
            raise Damaged(f"{path} lacks {', '.join(missing)}", "train or import the run again")
        return Run(path.parent, read_record(path, Manifest))

    def ancestor(self, entry: Mapping[str, Any]) -> Run | None:
        """The run of the weights that another's ``ancestors`` name, whatever it is called now; None where it is not
        here, as where another training has its name."""
        there = []
        for name in self.names():
            with suppress(RobenchError):  # a damaged run is not it
                run = self.get(name)
                if run.weights == entry["weights"]:
                    there.append(run)
        # A copy, such as an import, does not say how it was trained.
        return min(there, key=lambda run: (not run.manifest.get("recipe"), run.name != entry["run"]), default=None)

    def unused(self, name: str) -> str:
        """``name``; RobenchError where a run has it."""
        if checked_name(name) in self.names():
            raise RobenchError(f"run {name!r} exists; choose another with --name, or remove {self.folder(name)}")
        return name

    def all(self) -> list[Run]:
        return [self.get(name) for name in self.names()]

    def save(
        self,
        name: str,
        ensemble: Ensemble,
        *,
        members: Iterable[ModelSpec],
        defense: Mapping[str, Any],
        seed: int,
        role: Role,
        data: Mapping[str, str] | None,
        ancestors: Iterable[Mapping[str, Any]] = (),
        key: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> Run:
        """Writes weights and, last, the manifest: a run with a manifest is whole.

        Args:
            ancestors: ``{"run", "weights", "members"}`` of every run that this one's weights come from.
            key: the task's key, for a trained run.
        """
        folder = self.folder(name)
        tensors = ensemble.state_dict()
        write_tensors(folder / "weights.safetensors", tensors)
        manifest = {
            "format": FORMAT,
            "name": name,
            "defense": dict(defense),
            "seed": seed,
            "role": role,
            "members": [spec.manifest() for spec in members],
            "weights": tensors_hash(tensors),
            "member_weights": member_hashes(ensemble),
            "data": dict(data) if data else None,
            "ancestors": [dict(ancestor) for ancestor in ancestors],
            "key": key,
            **_unusual(ensemble.rule),
            "versions": versions(),
            **(more or {}),
        }
        write_record(folder / "manifest.json", manifest)
        return self.get(name)


def _unusual(rule: Rule) -> dict[str, str]:
    return {} if rule == USUAL else {"rule": rule}


def member_hashes(ensemble: Ensemble) -> list[str]:
    """The hash of each member's parameters and buffers, so that shared members are found across ensembles."""
    return [tensors_hash(member.state_dict()) for member in ensemble.members]


def lineage(run: Run) -> list[dict[str, Any]]:
    """What a child of ``run`` records as its ancestors: the run and its own ancestors."""
    own = {"run": run.name, "weights": run.weights, "members": run.manifest["member_weights"]}
    return [own, *run.manifest["ancestors"]]


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], owner: str) -> None:
    """Loads a state dict completely, or says in one line what does not fit."""
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        lacks = f"lacks {missing[0]!r} ({len(missing)} in all)" if missing else ""
        has = f"has {extra[0]!r} ({len(extra)} in all) too many" if extra else ""
        raise RobenchError(
            f"the weights of {owner!r} do not fit the model: it {' and '.join(filter(None, (lacks, has)))}; "
            f"choose the architecture with --model"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise RobenchError(
                f"the weights of {owner!r} do not fit the model: {name!r} is {tuple(tensor.shape)}, "
                f"expected {tuple(wanted[name].shape)}; choose the architecture with --model"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RobenchError(f"the weights of {owner!r} are not finite: {name!r} holds NaN or infinity")
    module.load_state_dict(dict(tensors))
