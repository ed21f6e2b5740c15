"""Whether a plug-in keeps its contract, on small networks and images: `robench check plugin`.

A check is a function of the plug-in that returns what it saw, or raises: `Violation` where the contract is broken,
`Doubt` where robench puts it right or where it may be meant. Whatever else it raises is a violation too.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robench.attacks import ATTACKS, Attack
from robench.attacks.base import images_of
from robench.core import linf
from robench.core.data import DATASETS, Data, load
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError, in_a_line, unknown
from robench.core.features import depth, features
from robench.core.frozen import frozen
from robench.core.losses import LOSSES
from robench.core.models import MODELS, ModelSpec, Normalized, ResNet, WideResNet, build, import_model, imported
from robench.core.registry import Registry
from robench.core.rng import Draws, Stream
from robench.defenses import DEFENSES, Batch, Defense
from robench.evaluation.findings import Finding
from robench.training import recipes

Kind = Literal["attack", "defense", "model", "dataset"]

REGISTRIES: dict[Kind, Registry[Any]] = {"attack": ATTACKS, "defense": DEFENSES, "model": MODELS, "dataset": DATASETS}

#: Large, so that attacks that stop at success soon do.
EPS = 0.3
#: What float32 may leave the ball by.
SLACK = 1e-6
#: By what float64 results may differ between batches.
ROUNDING = 1e-9


class _Told(Exception):
    """What a check saw, and what to do about it."""

    def __init__(self, evidence: str, fix: str = "") -> None:
        super().__init__(evidence)
        self.fix = fix


class Violation(_Told):
    """What the contract forbids."""


class Doubt(_Told):
    """What the contract puts right, or what may be meant but is worth knowing."""


def kinds(name: str) -> list[Kind]:
    """What ``name`` is registered as; ``package.module:factory`` is a model, ``npz:PATH``, ``folder:PATH`` and
    ``hf:OWNER/NAME`` data.

    Raises:
        RobenchError: nothing of that name, or a third-party plug-in that fails to load.
    """
    prefix, colon, _ = name.partition(":")
    if colon:
        if prefix in ("npz", "folder", "hf"):
            return ["dataset"]
        _refuse_classes(name)
        return ["model"]
    family, slash, _ = name.partition("/")
    found: list[Kind] = []
    for kind, registry in REGISTRIES.items():
        if name in registry.names() or (slash and family in registry.prefixes()):
            registry.get(name)
            found.append(kind)
    if not found:
        raise unknown("plug-in", name, {each for registry in REGISTRIES.values() for each in registry.names()})
    return found


def _refuse_classes(name: str) -> None:
    """An attack or a defense is known by the name that its package gives it, and not by its place."""
    try:
        made = imported(name)
    except RobenchError:  # which the checks of models say
        return
    for kind, base in (("attack", Attack), ("defense", Defense)):
        if isinstance(made, type) and issubclass(made, base):
            raise RobenchError(
                f"{name!r} is a class of {kind}s, and no factory of a model; install its package and give the name "
                f'that [project.entry-points."robench.{kind}s"] of its pyproject.toml has for it'
            )


def titles(kind: Kind) -> list[str]:
    """What is checked of that kind of plug-in, in order."""
    return [_title(check) for check in CHECKS[kind]]


def examine(kind: Kind, name: str, folder: Path | str = "data", *, only: str | None = None) -> Iterator[Finding]:
    """Every check of that kind of plug-in, in order, as they finish.

    Args:
        folder: where official data sets are kept.
        only: one of `titles`: that check alone.
    """
    base = {"attack": Attack, "defense": Defense}.get(kind)
    if base is None:
        plugin: Any = name if kind == "model" else _Loaded(name, folder)
    else:
        plugin = REGISTRIES[kind].get(name)
        if not (isinstance(plugin, type) and issubclass(plugin, base)):
            what = f"is {plugin!r}, expected a subclass of robench.{kind}s.{base.__name__}"
            yield Finding(f"is a class of {kind}s", "fail", what)
            return
    for check in CHECKS[kind]:
        title = _title(check)
        if only not in (None, title):
            continue
        try:
            yield Finding(title, "pass", check(plugin))
        except _Told as told:
            yield Finding(title, "warn" if isinstance(told, Doubt) else "fail", str(told), told.fix)
        except Exception as error:  # a plug-in may raise anything
            yield Finding(title, "fail", in_a_line(error, 1000))


def _title(check: Callable[[Any], str]) -> str:
    return check.__name__.strip("_").replace("_", " ")


def _require(kept: bool, evidence: str, fix: str = "") -> None:
    if not kept:
        raise Violation(evidence, fix)


# What a plug-in may not change


def _generators() -> tuple[object, ...]:
    """The state of every global generator."""
    state = torch.get_rng_state().numpy().tobytes()
    return state, str(np.random.get_state(legacy=False)), random.getstate()  # noqa: NPY002


@contextmanager
def _reseeded(seed: int) -> Iterator[None]:
    """Other global generators within, the old ones afterwards."""
    numbers, own = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numbers)  # noqa: NPY002
            random.setstate(own)


def _trace(model: nn.Module) -> dict[str, object]:
    """All that a model may be changed in, but for its tensors' values."""
    hooks = [value for module in model.modules() for key, value in vars(module).items() if "_hooks" in key]
    return {
        "modes": [module.training for module in model.modules()],
        "requires_grad flags": [parameter.requires_grad for parameter in model.parameters()],
        "parameter gradients": [parameter.grad is not None for parameter in model.parameters()],
        "hooks": [list(each) for each in hooks if isinstance(each, dict)],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "BatchNorm tracking": [getattr(module, "track_running_stats", None) for module in model.modules()],
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
    }


def _require_no_trace(model: nn.Module, before: Mapping[str, object]) -> None:
    after = _trace(model)
    changed = [name for name, value in before.items() if after[name] != value]
    _require(not changed, f"changes the model's {', '.join(changed)}")


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


# Attacks and defenses: what they are


def _is_data(kind: type[Attack] | type[Defense]) -> str:
    """Frozen, keyword-only, made from its defaults alone; its manifest is JSON and names it."""
    decorated = "__dataclass_params__" in vars(kind)
    _require(decorated, "is no dataclass", f"write @dataclass(frozen=True, kw_only=True) above {kind.__name__}")
    made = kind()
    own = [item.name for item in fields(made)]
    positional = [item.name for item in fields(made) if not item.kw_only]
    _require(not positional, f"{', '.join(positional)} can be given without a name", "write kw_only=True")
    try:
        setattr(made, own[0] if own else "anything", None)
    except FrozenInstanceError:
        pass
    else:
        raise Violation("its fields can be changed", "write frozen=True")
    manifest = made.manifest()
    try:
        same = json.loads(json.dumps(manifest)) == manifest
    except (TypeError, ValueError) as error:
        raise Violation(f"its manifest is no JSON ({error})", "fields are numbers, strings and switches") from error
    _require(same, f"its manifest is not itself after JSON: {manifest}", "fields are numbers, strings and switches")
    lacking = {"name", "version", *own} - manifest.keys()
    _require(not lacking, f"its manifest lacks {', '.join(sorted(lacking))}, so that keys would not hold them")
    _require(manifest["name"] == kind.name, f"its manifest calls it {manifest['name']!r}, it is {kind.name!r}")
    label = made.label if isinstance(made, Attack) else kind.name
    _require(label == kind.name, f"its label at its defaults is {label!r}, expected its name, {kind.name!r}")
    _require(isinstance(kind.version, int) and kind.version >= 1, f"`version` is {kind.version!r}, expected 1 or more")
    return f"version {kind.version}, fields: {', '.join(own) or 'none'}"


# Attacks


class _Scene:
    """Two narrow residual networks, confident and of more than one opinion, and images labelled as they see them."""

    def __init__(self, count: int = 6, dtype: torch.dtype = torch.float32) -> None:
        self.model = Ensemble(self._member(key) for key in range(2)).to(dtype).eval()
        self.images = Stream(("conformance",)).uniform((count, 3, 8, 8), "images").to(dtype)
        self.images[:, :, 0], self.images[:, :, 1] = 0, 1
        with torch.no_grad():
            self.labels: Tensor = self.model(self.images).argmax(dim=1)
        self.draws = Draws.of(range(count))

    @staticmethod
    def _member(key: int) -> Normalized:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            network = ResNet(14, num_classes=5, in_channels=3, widths=(4, 6, 8))
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.3, 0.3)
            network.fc.weight.data.mul_(4)
            network.fc.bias.data.zero_()
        return Normalized(network, (0.5,) * 3, (0.25,) * 3)

    def crafted(self, attack: Attack, eps: float | Tensor = EPS, restart: int = 0) -> Tensor:
        return attack(self.model, self.images, self.labels, eps, self.draws.at(restart)).images

    def raw(self, attack: Attack, eps: Tensor) -> Tensor:
        """What the plug-in returns before the contract projects it."""
        with frozen(self.model):
            return images_of(attack.perturb(self.model, self.images, self.labels, eps, self.draws)).detach()

    def radii(self) -> Tensor:
        """Several ε, as in a curve."""
        return self.images.new_tensor([EPS, 0.1, 0.03] * len(self.images))[: len(self.images)]


def _few_steps(kind: type[Any]) -> Any:
    """The plug-in at its defaults, but for its steps, and for how many passes each of them is a mean of, where it takes
    as few."""
    names = {item.name for item in fields(kind)}
    steps = dict.fromkeys(names & {"steps", "advt_steps", "queries"}, 6 if issubclass(kind, Attack) else 2)
    try:
        return kind(**steps, **dict.fromkeys(names & {"copies", "neighbours"}, 3))
    except RobenchError:
        return kind(**steps)


def _refuses_wrong_fields(kind: type[Attack]) -> str:
    wrong: list[dict[str, Any]] = [{"loss": "nonsense"}]
    wrong += [{item.name: 0} for item in fields(kind) if item.name in ("steps", "restarts", "queries")]
    for values in wrong:
        try:
            kind(**values)
        except RobenchError as error:
            _require(
                next(iter(values)) in str(error), f"refuses {values} without a word of it: {error}", "name the field"
            )
            continue
        raise Violation(f"takes {values}", "call super().__post_init__() in its own __post_init__")
    return ", ".join(f"{name}={value}" for values in wrong for name, value in values.items())


def _returns_images_like_those_it_got(kind: type[Attack]) -> str:
    for dtype in (torch.float32, torch.float64):
        scene = _Scene(dtype=dtype)
        raw = scene.raw(_few_steps(kind), scene.radii())
        wanted = (tuple(scene.images.shape), dtype)
        _require((tuple(raw.shape), raw.dtype) == wanted, f"returns {tuple(raw.shape)} of {raw.dtype}, not {wanted}")
        _require(bool(torch.isfinite(raw).all()), f"returns NaN or infinity in {dtype}")
    return "shape, dtype and finite, in float32 and float64"


def _stays_in_the_ball_and_in_the_box_by_itself(kind: type[Attack]) -> str:
    scene = _Scene()
    lower, upper = linf.bounds(scene.images, scene.radii())
    raw = scene.raw(_few_steps(kind), scene.radii())
    beyond = float(torch.maximum(lower - raw, raw - upper).max())
    if beyond > SLACK:
        raise Doubt(f"leaves them by {beyond:.2g}; robench projects, which may weaken the attack")
    return f"by {max(beyond, 0):.1g} at most, ε {scene.radii().min():g}..{EPS:g}"


def _takes_one_eps_per_image(kind: type[Attack]) -> str:
    attack, scene = _few_steps(kind), _Scene()
    one, many = scene.crafted(attack), scene.crafted(attack, torch.full((len(scene.images),), EPS))
    _require(torch.equal(one, many), "a number and as many equal values give different images")
    still = scene.crafted(attack, torch.zeros(len(scene.images)))
    _require(torch.equal(still, scene.images), "ε 0 changes the images")
    return "a number and equal values agree; ε 0 changes nothing"


def _raises_the_loss(kind: type[Attack]) -> str:
    attack, scene = _few_steps(kind), _Scene()
    crafted = scene.crafted(attack)
    moved = int((linf.distance(crafted, scene.images) > 0).sum())
    _require(moved > 0, f"no image of {len(crafted)} moves at ε {EPS}")
    loss = LOSSES.get(attack.loss)
    with torch.no_grad():
        clean, after = (float(loss(scene.model(z), scene.labels).mean()) for z in (scene.images, crafted))
    if after <= clean:
        raise Doubt(f"mean {attack.loss} is {clean:.3g} on the clean images and {after:.3g} on its own")
    return f"mean {attack.loss} {clean:.3g} → {after:.3g}; {moved} of {len(crafted)} images move at ε {EPS}"


def _leaves_nothing_on_the_model(kind: type[Attack]) -> str:
    scene = _Scene()
    scene.model.members[0].train()
    scene.model.members[1].requires_grad_(False)
    scene.model.members[0].register_forward_hook(lambda *_: None)
    before, values = _trace(scene.model), _values(scene.model)
    scene.crafted(_few_steps(kind))
    _require_no_trace(scene.model, before)
    changed = _changed(values, scene.model.state_dict())
    _require(not changed, f"changes {len(changed)} tensors of the model, such as {changed[:1]}")
    return "modes, flags, gradients, hooks, attributes and weights are as before"


def _leaves_its_inputs_alone(kind: type[Attack]) -> str:
    scene, radii = _Scene(), _Scene().radii()
    kept = {"images": scene.images.clone(), "labels": scene.labels.clone(), "eps": radii.clone()}
    scene.raw(_few_steps(kind), radii)
    given = {"images": scene.images, "labels": scene.labels, "eps": radii}
    changed = [*_changed(kept, given), *(name for name, value in given.items() if value.requires_grad)]
    if changed:
        raise Doubt(f"changes {', '.join(changed)} in place; robench hands it copies")
    return ", ".join(kept)


def _leaves_the_global_generators_alone(kind: type[Attack]) -> str:
    scene, before = _Scene(), _generators()
    scene.crafted(_few_steps(kind))
    _require(_generators() == before, "draws from a global generator", "take numbers from `draws`")
    return "torch, numpy, random"


def _is_deterministic(kind: type[Attack]) -> str:
    found = []
    for seed in (1, 2):
        with _reseeded(seed):
            found.append(_Scene().crafted(_few_steps(kind)))
    _require(torch.equal(*found), "the same draws give other images when the global generators are seeded otherwise")
    return "the same images to the bit, however the global generators are seeded"


def _restarts_as_it_says(kind: type[Attack]) -> str:
    attack, scene = _few_steps(kind), _Scene()
    same = torch.equal(scene.crafted(attack, restart=0), scene.crafted(attack, restart=1))
    _require(
        same is not attack.stochastic,
        f"`stochastic` is {attack.stochastic}, but another restart gives {'the same' if same else 'other'} images",
    )
    return f"stochastic is {attack.stochastic}"


def _does_not_depend_on_the_batch(kind: type[Attack]) -> str:
    attack = _few_steps(kind)
    if attack.batch_dependent:
        return "not asked for: batch_dependent is True"
    scene = _Scene(9, torch.float64)

    def craft(rows: Sequence[int]) -> Tensor:
        index, draws = list(rows), Draws.of([100 + row for row in rows])
        images, labels, radii = scene.images[index], scene.labels[index], scene.radii()[index]
        return attack(scene.model, images, labels, radii, draws).images  # type: ignore[no-any-return]

    whole, order = craft(range(9)), [5, 0, 7, 2, 8, 1, 6, 3, 4]
    parts = torch.cat([craft(range(3)), craft(range(3, 5)), craft(range(5, 9))])
    for what, difference in (("smaller batches", parts - whole), ("another order", craft(order) - whole[order])):
        worst = float(difference.abs().max())
        remedy = "draw from `draws`, or say `batch_dependent: ClassVar[bool] = True`"
        _require(worst <= ROUNDING, f"{what} change images by up to {worst:.2g}", remedy)
    return f"smaller batches and another order give the same images within {ROUNDING:g} in float64"


# Defenses


class _Training:
    """An ensemble in train mode, the last member of another architecture, and a batch."""

    def __init__(self, kind: type[Defense], mixed: bool = False, count: int = 3) -> None:
        self.defense: Defense = _few_steps(kind)
        members: list[nn.Module] = [build(_spec("resnet8", 10, 3), key) for key in range(max(count, kind.min_members))]
        if mixed:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                other = WideResNet(10, 1, num_classes=10, in_channels=3)
            members[-1] = Normalized(other, (0.5,) * 3, (0.25,) * 3)
        self.ensemble = Ensemble(members).train()
        epoch = Stream(("conformance",)).within("epoch", 0)
        draws = epoch.within("step", 0)
        images, paired = (draws.uniform((8, 3, 8, 8), name) for name in ("first", "second"))
        self.batch = Batch(
            images,
            draws.permutation(8, "labels"),
            draws,
            epoch,
            paired if kind.paired else None,
            samples=torch.arange(8),
            train_size=8,
            turn=len(members) - 1 if kind.in_turn else 0,
        )

    def loss(self) -> list[dict[str, float]]:
        """As training does, without the update."""
        values = []
        for terms in self.defense.loss(self.ensemble, self.batch):
            _require(isinstance(terms, Mapping) and len(terms) > 0, f"yields {terms!r}, expected named scalar tensors")
            for name, term in terms.items():
                _require(isinstance(term, Tensor) and term.shape == (), f"term {name!r} is no scalar tensor: {term!r}")
            torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
            values.append({name: term.item() for name, term in terms.items()})
        _require(bool(values), "yields nothing")
        return values


def _not_finite(values: Sequence[Mapping[str, float]]) -> str:
    """Names of terms that are NaN or infinite in some yield, with commas."""
    return ", ".join(sorted({name for terms in values for name, value in terms.items() if not np.isfinite(value)}))


def _has_a_finite_loss(kind: type[Defense]) -> str:
    values = _Training(kind).loss()
    bad = _not_finite(values)
    _require(not bad, f"{bad} is not finite")
    names = list(dict.fromkeys(name for terms in values for name in terms))
    return f"{sum(sum(terms.values()) for terms in values):.4g} in {len(values)} yields of {', '.join(names)}"


def _reaches_every_member(kind: type[Defense]) -> str:
    for mixed in (False, True):
        training = _Training(kind, mixed)
        members = list(training.ensemble.members)
        for turn in range(len(members)) if kind.in_turn else (0,):
            training.ensemble.zero_grad()
            training.batch = replace(training.batch, turn=turn)
            training.loss()
            for number, member in enumerate(members, 1):
                if not kind.in_turn or number == turn + 1:
                    _require_gradients(member, f"of member {number}")
                elif any(weights.grad is not None for weights in member.parameters()):
                    raise Violation(f"member {number} gets a gradient in the turn of member {turn + 1}")
    return f"every weight of {len(training.ensemble)} members, alike and of two architectures"


def _require_gradients(member: nn.Module, owner: str) -> None:
    for name, weights in member.named_parameters():
        _require(weights.grad is not None, f"{name} {owner} gets no gradient")
        assert weights.grad is not None
        _require(bool(torch.isfinite(weights.grad).all()), f"{name} {owner} gets a gradient that is not finite")
        _require(weights.ndim == 1 or bool(weights.grad.any()), f"{name} {owner} gets a gradient of zero")


def _is_deterministic_in_training(kind: type[Defense]) -> str:
    found = []
    for seed in (1, 2):
        with _reseeded(seed):
            training = _Training(kind)
            found.append((training.loss(), _values(training.ensemble)))
    (one, weights), (other, others) = found
    _require(one == other, f"the same draws give {one} and {other}", "take numbers from `batch.draws`")
    _require(not _changed(weights, others), "the same draws leave other running statistics")
    return "the same loss to the bit, however the global generators are seeded"


def _restores_modes_and_flags(kind: type[Defense]) -> str:
    training = _Training(kind)
    training.ensemble.members[0].eval()
    training.ensemble.members[1].requires_grad_(False)
    weights = {name: value.clone() for name, value in training.ensemble.named_parameters()}
    before = _trace(training.ensemble)
    for _ in training.defense.loss(training.ensemble, training.batch):
        _require_no_trace(training.ensemble, before)
    _require_no_trace(training.ensemble, before)
    changed = _changed(weights, dict(training.ensemble.named_parameters()))
    _require(not changed, f"changes {len(changed)} weights by itself, such as {changed[:1]}; training updates them")
    return "modes, flags, gradients, hooks, attributes and weights are as before at every yield"


def _leaves_its_batch_alone(kind: type[Defense]) -> str:
    training = _Training(kind)
    batch = training.batch
    tensors = {name: getattr(batch, name) for name in ("images", "labels", "paired") if hasattr(batch, name)}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    kept = {name: value.clone() for name, value in tensors.items()}
    training.loss()
    changed = [*_changed(kept, tensors), *(name for name, value in tensors.items() if value.requires_grad)]
    _require(not changed, f"changes {', '.join(changed)} of the batch in place", "clone first")
    return ", ".join(kept)


def _leaves_the_generators_alone_in_training(kind: type[Defense]) -> str:
    training, before = _Training(kind), _generators()
    training.loss()
    _require(_generators() == before, "draws from a global generator", "take numbers from `batch.draws`")
    return "torch, numpy, random"


def _refuses_too_few_members(kind: type[Defense]) -> str:
    defense = kind()
    try:
        defense.check(members=kind.min_members, classes=10)
    except RobenchError as error:
        raise Violation(f"refuses {kind.min_members} members, its min_members: {error}", "raise min_members") from error
    for members in range(kind.min_members):
        try:
            defense.check(members=members, classes=10)
        except RobenchError as error:
            _require("`n`" in str(error), f"refuses {members} members without a word of `n`: {error}", "name it")
            continue
        raise Violation(f"takes {members} members, with min_members {kind.min_members}", "call super().check(...)")
    return f"fewer than {kind.min_members}"


def _trains_as_few_members_as_it_takes(kind: type[Defense]) -> str:
    fewest = max(1, kind.min_members)
    so_few = f"of {fewest} member{'s' * (fewest > 1)}"
    remedy = f"say `min_members: ClassVar[int] = {fewest + 1}` if it needs more"
    try:
        bad = _not_finite(_Training(kind, count=1).loss())
    except _Told as told:
        raise Violation(f"{so_few} it {told}", remedy) from told
    except Exception as error:  # a plug-in may raise anything
        raise Violation(f"{so_few} it fails with {in_a_line(error)}", remedy) from error
    _require(not bad, f"{so_few} {bad} is not finite", remedy)
    return f"{fewest}"


# Models


def _spec(name: str, classes: int, channels: int) -> ModelSpec:
    half, quarter = (0.5,) * channels, (0.25,) * channels
    return ModelSpec(name=name, num_classes=classes, in_channels=channels, mean=half, std=quarter)


def _model(name: str, classes: int = 10, channels: int = 3, key: int = 0) -> Normalized:
    """In eval mode. The user typed the name, so it may name code."""
    if ":" in name:
        import_model(name)
    return build(_spec(name, classes, channels), key).eval()


def _pictures(count: int = 4, channels: int = 3) -> Tensor:
    return Stream(("conformance",)).uniform((count, channels, 32, 32), "pictures")


def _honours_classes_and_channels(name: str) -> str:
    for classes, channels in ((10, 3), (7, 1)):
        with torch.no_grad():
            logits = _model(name, classes, channels)(_pictures(4, channels))
        wanted = (4, classes)
        asked = f"num_classes={classes}, in_channels={channels} and 4 images of 32x32"
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        _require(got == wanted, f"expected logits {wanted} for {asked}, got {got}")
        _require(bool(torch.isfinite(logits).all()), f"logits are not finite for {asked}")
    return "logits (4,10) of 3 channels and (4,7) of 1, 32x32"


def _is_built_from_its_key_alone(name: str) -> str:
    states = []
    for seed, key in ((1, 0), (2, 0), (1, 1)):
        with _reseeded(seed):
            states.append(_values(_model(name, key=key)))
    first, again, other = states
    _require(not _changed(first, again), "the same key gives other weights when global generators are seeded otherwise")
    _require(bool(_changed(first, other)), "another key gives the same weights")
    return f"{sum(value.numel() for value in first.values()):,} numbers, the same to the bit"


def _shows_its_layers(name: str) -> str:
    model, images = _model(name), _pictures()
    layers = depth(model, images[:1])
    for layer in sorted({1, (layers + 1) // 2, layers}):
        point = images.clone().requires_grad_(True)
        found = features(model, point, layer)
        _require(len(found) == len(images), f"f^{layer} is {tuple(found.shape)}, expected {len(images)} rows")
        (slope,) = torch.autograd.grad(found.square().sum(), point)
        _require(bool(torch.isfinite(slope).all() and slope.any()), f"f^{layer} has no gradient to the image")
    return f"{layers} layers"


def _judges_every_image_alone(name: str) -> str:
    model, images = _model(name).double(), _pictures().double()
    before, values, generators = _trace(model), _values(model), _generators()
    with torch.no_grad():
        whole, again = model(images), model(images)
        apart = torch.cat([model(images[:2]), model(images[2:])])
    _require(torch.equal(whole, again), "eval mode gives other logits the second time")
    worst = float((whole - apart).abs().max())
    allowed = ROUNDING * max(1.0, float(whole.abs().max()))
    _require(worst <= allowed, f"in eval mode the batch moves logits by {worst:.2g}")
    _require_no_trace(model, before)
    _require(not _changed(values, model.state_dict()), "eval mode changes its tensors")
    _require(_generators() == generators, "eval mode draws from a global generator")
    return f"in eval mode the batch moves logits by {worst:.1g} in float64, and nothing changes"


def _trains_from_its_seed(name: str) -> str:
    """Training keys torch's generator at every step, for dropout; no other."""
    model, before, found = _model(name).train(), _generators()[1:], []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            found.append(model(_pictures()))
    one, again = found
    got = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
    _require(got == (4, 10), f"expected logits (4, 10) in train mode too, got {got}")
    _require(torch.equal(one, again), "train mode gives other logits for the same state of torch's generator")
    _require(
        _generators()[1:] == before, "train mode draws from numpy or random", "draw from torch, which training keys"
    )
    one.square().sum().backward()
    if idle := [key for key, weights in model.named_parameters() if weights.grad is None]:
        raise Doubt(f"{len(idle)} parameters get no gradient, such as {idle[0]}")
    return "the same logits for the same state of torch's generator, and every parameter gets a gradient"


# Data sets


@dataclass
class _Loaded:
    """A data set, loaded once."""

    name: str
    folder: Path | str

    @cached_property
    def data(self) -> Data:
        return load(self.name, self.folder)


def _is_a_data_set(plugin: _Loaded) -> str:
    data = plugin.data
    _require(isinstance(data, Data), f"is {type(data).__name__}, expected robench.core.data.Data: see data.make")
    _require(data.name == plugin.name, f"calls itself {data.name!r}; its name goes into keys")
    _require(data.recipe in recipes.names(), f"names a recipe that is not there: {data.recipe!r}")
    return f"{len(data.train)} + {len(data.test)} images, {data.num_classes} classes, recipe {data.recipe}"


def _holds_images_and_labels(plugin: _Loaded) -> str:
    data = plugin.data
    shape = data.train.images.shape[1:]
    for part, split in (("train", data.train), ("test", data.test)):
        images, labels = split.images, split.labels
        good = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3)
        _require(good, f"{part} images are {images.dtype} {tuple(images.shape)}, expected uint8 (M,C,H,W), C 1 or 3")
        _require(images.shape[1:] == shape, f"train images are {tuple(shape)}, test images {tuple(images.shape[1:])}")
        good = labels.dtype == torch.int64 and labels.shape == (len(images),) and len(labels) > 0
        _require(good, f"{part} labels are {labels.dtype} {tuple(labels.shape)}, expected int64 ({len(images)},)")
        span = (int(labels.min()), int(labels.max()))
        _require(
            span[0] >= 0 and span[1] < data.num_classes, f"{part} labels {span}, classes 0..{data.num_classes - 1}"
        )
    good = len(data.mean) == len(data.std) == shape[0] and min(data.std) > 0
    _require(good, f"mean {data.mean} and std {data.std}, expected one each for {shape[0]} channels, std positive")
    return f"uint8 {tuple(shape)}, labels 0..{data.num_classes - 1}, mean and std per channel"


def _is_the_same_every_time(plugin: _Loaded) -> str:
    with _reseeded(1):
        again = load(plugin.name, plugin.folder)
    _require(again.fingerprint == plugin.data.fingerprint, "the second load gives other images or labels")
    return f"fingerprint {again.fingerprint[:16]}"


def _keeps_test_images_apart(plugin: _Loaded) -> str:
    train, test = (
        {hashlib.blake2b(row, digest_size=16).digest() for row in split.images.numpy()}
        for split in (plugin.data.train, plugin.data.test)
    )
    if shared := len(train & test):
        raise Doubt(f"{shared} test images are among the training images")
    return f"none of {len(test)} among the training images"


CHECKS: dict[Kind, tuple[Callable[[Any], str], ...]] = {
    "attack": (
        _is_data,
        _refuses_wrong_fields,
        _returns_images_like_those_it_got,
        _stays_in_the_ball_and_in_the_box_by_itself,
        _takes_one_eps_per_image,
        _raises_the_loss,
        _leaves_nothing_on_the_model,
        _leaves_its_inputs_alone,
        _leaves_the_global_generators_alone,
        _is_deterministic,
        _restarts_as_it_says,
        _does_not_depend_on_the_batch,
    ),
    "defense": (
        _is_data,
        _has_a_finite_loss,
        _reaches_every_member,
        _is_deterministic_in_training,
        _restores_modes_and_flags,
        _leaves_its_batch_alone,
        _leaves_the_generators_alone_in_training,
        _refuses_too_few_members,
        _trains_as_few_members_as_it_takes,
    ),
    "model": (
        _honours_classes_and_channels,
        _is_built_from_its_key_alone,
        _shows_its_layers,
        _judges_every_image_alone,
        _trains_from_its_seed,
    ),
    "dataset": (_is_a_data_set, _holds_images_and_labels, _is_the_same_every_time, _keeps_test_images_apart),
}
