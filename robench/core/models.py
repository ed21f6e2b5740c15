"""CIFAR networks, other people's networks, and the normalisation that lives inside every model.

``torchvision/<name>`` and ``timm/<name>`` are the networks of those packages as they are, without their weights and
with their own stems: a stem made for 224 pixels leaves little of an image of 32.
"""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robench.core.errors import RobenchError, unknown, within
from robench.core.networks import VGG16, MobileNetV2
from robench.core.registry import Registry


class Factory(Protocol):
    """Makes a network: images (B, in_channels, S, S), normalised -> logits (B, num_classes)."""

    def __call__(self, *, num_classes: int, in_channels: int) -> nn.Module: ...


MODELS: Registry[Factory] = Registry(
    "model",
    group="robench.models",
    own="one of your own is package.module:factory, or, in a study, installed first: pip install -e FOLDER",
)


class _Block(nn.Module):
    """Two 3x3 convolutions and a skip; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_width != width:
            self.downsample = nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(branch + skip)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """The residual network for small images (He et al. 2016, §4.2), with 1x1-convolution shortcuts: a 3x3 stem, and
    stages that halve the size from the second on.

    ResNet-20, of 6n+2 layers, has 272,474 parameters; with ``blocks``, the layers of ResNet-18 (11,173,962) and -34
    (21,282,122, as in https://github.com/kuangliu/pytorch-cifar). Parameter names are those of torchvision and of the
    DVERGE checkpoints.

    Args:
        widths: of the three or four stages; blocks: in each, (depth − 2)/6 by default.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int,
        in_channels: int,
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        blocks = blocks or [(depth - 2) // 6] * 3
        self.layer1 = self._stage(widths[0], widths[0], blocks[0], 1)
        self.layer2 = self._stage(widths[0], widths[1], blocks[1], 2)
        self.layer3 = self._stage(widths[1], widths[2], blocks[2], 2)
        self.layer4 = self._stage(widths[2], widths[3], blocks[3], 2) if len(widths) > 3 else None
        self.fc = nn.Linear(widths[-1], num_classes)
        _initialise(self)

    @staticmethod
    def _stage(in_width: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        return nn.Sequential(_Block(in_width, width, stride), *(_Block(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = x if self.layer4 is None else self.layer4(x)
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class _PreactivationBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a skip; where the width changes, a 1x1 convolution of what the
    branch reads."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = None if in_width == width else nn.Conv2d(in_width, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(active)
        branch: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return branch + skip


class PreactivationResNet(nn.Module):
    """A residual network whose blocks activate before they convolve (He et al. 2016b,
    https://arxiv.org/abs/1603.05027), and once more at the end. PreActResNet-18 has 11,172,170 parameters.

    Args:
        widths: of the stem and of the three or four stages; blocks: in each stage.
    """

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.block1 = self._stage(widths[0], widths[1], blocks[0], 1)
        self.block2 = self._stage(widths[1], widths[2], blocks[1], 2)
        self.block3 = self._stage(widths[2], widths[3], blocks[2], 2)
        self.block4 = self._stage(widths[3], widths[4], blocks[3], 2) if len(widths) > 4 else None
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(widths[-1], num_classes)
        _initialise(self)

    @staticmethod
    def _stage(in_width: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (_PreactivationBlock(width, width, 1) for _ in range(blocks - 1))
        layer = nn.Sequential(_PreactivationBlock(in_width, width, stride), *rest)
        return nn.Sequential(OrderedDict(layer=layer))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = x if self.block4 is None else self.block4(x)
        return self.fc(self.relu(self.bn1(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class WideResNet(PreactivationResNet):
    """The wide residual network of 6n+4 layers (Zagoruyko & Komodakis 2016), without dropout.

    https://arxiv.org/abs/1605.07146. WRN-28-10 has 36,479,194 parameters, WRN-34-10 46,160,474; parameter names are
    those of TRADES and RobustBench.

    Args:
        widen: k; the stages are 16k, 32k and 64k wide.
    """

    def __init__(self, depth: int, widen: int, *, num_classes: int, in_channels: int) -> None:
        widths, blocks = [16, *(width * widen for width in (16, 32, 64))], [(depth - 4) // 6] * 3
        super().__init__(widths, blocks, num_classes=num_classes, in_channels=in_channels)


def _initialise(model: nn.Module) -> None:
    """He et al. 2015, by outputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


#: Widths of the networks that were made for 224 pixels.
_STAGES = (64, 128, 256, 512)

for _depth in (8, 14, 20, 32, 56):
    MODELS.register(f"resnet{_depth}")(partial(ResNet, _depth))
for _depth, _blocks in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))):
    MODELS.register(f"resnet{_depth}")(partial(ResNet, _depth, widths=_STAGES, blocks=_blocks))
for _depth, _widen in ((16, 4), (28, 10), (34, 10)):
    MODELS.register(f"wrn{_depth}-{_widen}")(partial(WideResNet, _depth, _widen))
MODELS.register("preactresnet18")(partial(PreactivationResNet, (64, *_STAGES), (2, 2, 2, 2)))
MODELS.register("vgg16-bn")(VGG16)
MODELS.register("mobilenetv2")(MobileNetV2)


def _package(name: str, remedy: str) -> ModuleType:
    """A package of networks, imported when one of them is asked for."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch raises RuntimeError
        raise RobenchError(f"models of {name} need that package, which does not import ({error}); {remedy}") from error


def _torchvision() -> ModuleType:
    _package("torchvision", "install torch and torchvision together, from one index: pip install torch torchvision")
    return importlib.import_module("torchvision.models")


def _timm() -> ModuleType:
    _torchvision()  # timm imports it, and is not to blame for it
    return _package("timm", "pip install robench[timm]")


def _torchvision_names() -> list[str]:
    models = _torchvision()
    return list(models.list_models(module=models))  # without those that segment, detect or see films


def _timm_names() -> list[str]:
    return list(_timm().list_models())


#: In training these return a tuple, unless they are made without their auxiliary heads.
_AUXILIARY = ("googlenet", "inception_v3")


def _make_torchvision(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """A network of torchvision. Other than 3 channels replace its first convolution, whose initial weights are then
    PyTorch's default."""
    options = {"aux_logits": False, "init_weights": True} if name in _AUXILIARY else {}
    model: nn.Module = _torchvision().get_model(name, weights=None, num_classes=num_classes, **options)
    path, first = next(item for item in model.named_modules() if isinstance(item[1], nn.Conv2d))
    assert isinstance(first, nn.Conv2d)
    if first.in_channels != in_channels:
        own = nn.Conv2d(
            in_channels,
            first.out_channels,
            first.kernel_size,  # type: ignore[arg-type]
            first.stride,  # type: ignore[arg-type]
            first.padding,  # type: ignore[arg-type]
            bias=first.bias is not None,
        )
        model.set_submodule(path, own)
    return model


def _make_timm(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    model: nn.Module = _timm().create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    return model


#: Classes of RobustBench's data sets.
_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


def robustbench_entry(name: str) -> tuple[dict[str, Any], int]:
    """What RobustBench knows of DATASET/THREAT/NAME: its entry, and how many classes the network has.

    Raises:
        RobenchError: the package does not import, or has no such model.
    """
    zoo = _robustbench()
    if name not in zoo:
        raise unknown("model of RobustBench", name, zoo)
    return zoo[name], _CLASSES[name.partition("/")[0]]


def _robustbench() -> dict[str, dict[str, Any]]:
    """Its models by DATASET/THREAT/NAME."""
    _package("robustbench", "pip install it from its own repository, without torchattacks, which brings an old one")
    zoo = importlib.import_module("robustbench.model_zoo").model_dicts
    threats = [(f"{data.value}/{threat.value}", models) for data, of in zoo.items() for threat, models in of.items()]
    return {f"{where}/{name}": entry for where, models in threats for name, entry in models.items()}


def _make_robustbench(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """A network of RobustBench, which takes images in [0, 1]."""
    entry, classes = robustbench_entry(name)
    if (num_classes, in_channels) != (classes, 3):
        raise RobenchError(
            f"model robustbench/{name} has {classes} classes and 3 channels, the data {num_classes} and {in_channels}"
        )
    model: nn.Module = entry["model"]()
    return model


def _resolver(prefix: str, names: Callable[[], list[str]], make: Callable[..., nn.Module]) -> Callable[[str], Factory]:
    def resolve(name: str) -> Factory:
        known = names()
        if name not in known:
            raise unknown("model", f"{prefix}/{name}", [f"{prefix}/{each}" for each in known])
        return partial(make, name)

    return resolve


for _prefix, _names, _make in (
    ("torchvision", _torchvision_names, _make_torchvision),
    ("timm", _timm_names, _make_timm),
    ("robustbench", lambda: list(_robustbench()), _make_robustbench),
):
    MODELS.family(_prefix, _resolver(_prefix, _names, _make), _names)


class Normalized(nn.Module):
    """A network with its normalisation inside: images in [0, 1] (B,C,H,W) -> logits (B,K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def normalize(self, images: Tensor) -> Tensor:
        """What the network sees of images in [0, 1], (B,C,H,W)."""
        return (images - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalize(images))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is needed to build a member's architecture again; kept in the manifest of a run.

    Attributes:
        name: a registered name (``resnet20``, ``torchvision/resnet18``, ``timm/...``), or, from the command line
            and Python alone, ``package.module:factory``.
        negative_slope: slope of the activations below zero; 0 is ReLU, GAL trains with 0.1.
    """

    name: str
    num_classes: int
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    negative_slope: float = 0.0

    @classmethod
    def of(cls, values: dict[str, Any]) -> ModelSpec:
        """The spec that a manifest holds; RobenchError where it holds something else."""
        try:
            return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except (KeyError, TypeError) as error:
            raise RobenchError(f"a manifest describes a model wrongly ({error}); got {values!r}") from error

    def manifest(self) -> dict[str, Any]:
        return asdict(self)


def build(spec: ModelSpec, key: int) -> Normalized:
    """A member with initial weights drawn from ``key`` alone; torch's global generator is left as it was.

    Raises:
        RobenchError: unknown name, a factory that does not take ``num_classes`` and ``in_channels``, or a
            ``package.module:factory`` that `import_model` was not called with; a slope for a network without ReLU
            modules.
    """
    factory = _imported(spec.name) if ":" in spec.name else MODELS.get(spec.name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key)  # torch.manual_seed would reseed the GPUs too
        try:
            with within("model", spec.name):
                model = factory(num_classes=spec.num_classes, in_channels=spec.in_channels)
        except TypeError as error:
            raise RobenchError(
                f"model {spec.name!r} cannot be built ({error}); its factory must take `num_classes` and `in_channels`"
            ) from error
    if spec.negative_slope and not _leak(model, spec.negative_slope):
        raise RobenchError(
            f"model {spec.name!r} has no nn.ReLU modules, so `negative_slope` {spec.negative_slope} changes nothing; "
            f"set it to 0"
        )
    return Normalized(model, spec.mean, spec.std)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _leak(model: nn.Module, slope: float) -> int:
    """Replaces every ReLU module by a LeakyReLU of that slope; returns how many places had one."""
    # One ReLU may stand in several places.
    places = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, nn.ReLU)
    ]
    for name, module in places:
        model.set_submodule(name, nn.LeakyReLU(slope, inplace=module.inplace))
    return len(places)


#: Factories by ``package.module:factory``, see `import_model`.
_IMPORTED: dict[str, Callable[..., nn.Module]] = {}


def is_imported(name: str) -> bool:
    """Whether `build` finds ``package.module:factory``."""
    return name in _IMPORTED


def _imported(name: str) -> Callable[..., nn.Module]:
    if name not in _IMPORTED:
        raise RobenchError(
            f"model {name!r} names code, which a file may not; type it yourself: --model {name}, or register it under "
            f"the entry point `robench.models`"
        )
    return _IMPORTED[name]


def _module(name: str) -> ModuleType:
    """A module by name; where none is installed, one in the working folder, as ``python -m`` finds it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = str(Path.cwd())
        if error.name != name.partition(".")[0] or here in sys.path:
            raise
        # Last: a file there hides no package.
        sys.path.append(here)
        importlib.invalidate_caches()
        return importlib.import_module(name)


def import_model(name: str) -> None:
    """Imports ``package.module:factory``, which runs that code; from now on `build` finds it under this name.

    To be called with names that the user typed alone: a manifest is data and may not name code.

    Raises:
        RobenchError: there is no such factory.
    """
    _IMPORTED[name] = imported(name)


def imported(name: str) -> Callable[..., Any]:
    """What ``package.module:factory`` names; see `import_model`."""
    module_name, _, attribute = name.partition(":")
    try:
        with within("model", name):
            factory: object = getattr(_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RobenchError(f"model {name!r} cannot be imported ({error}); expected package.module:factory") from error
    if not callable(factory):
        raise RobenchError(f"model {name!r} is a {type(factory).__name__}, expected a factory that can be called")
    return factory
