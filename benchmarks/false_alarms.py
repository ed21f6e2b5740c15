"""Sound models on which nothing should be said: how often do robench's checks and doctor say something all the same?

    python benchmarks/false_alarms.py --out results/false_alarms.md

Some fifty models, trained here in minutes on digits (networks of robench, torchvision, timm and by hand; plain and
adversarially trained; one and three channels, ten and a hundred classes; the six defenses), and the published weights
in ``../shared/data`` where they are there. Each is judged white-box by the protocol's PGD and looked at by doctor. All
are what they seem, so whatever does not pass is a false alarm, and is listed with what it says.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robench
from robench.cli import run as robench_command
from robench.core.data import Data, load, make, to_images
from robench.core.ensemble import Ensemble
from robench.core.files import write_text
from robench.core.models import build
from robench.evaluation.doctor import diagnose
from robench.store.importing import import_weights
from robench.store.runs import Runs

SHARED = Path(__file__).parents[2] / "shared/data"
SIDE = 32
TORCHVISION = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf"]
TORCHVISION += ["mnasnet0_5", "efficientnet_b0"]
TIMM = ["resnet10t", "mobilenetv3_small_050", "lcnet_050", "ghostnet_050", "resnet18", "semnasnet_050", "repvgg_a0"]
TIMM += ["tinynet_e"]

Model = tuple[nn.Module, Data]


class _Columns(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.rows(images.squeeze(1))[0][:, -1])  # type: ignore[no-any-return]


def _convolutions(activation: Callable[[], nn.Module], norm: Callable[[int], nn.Module], *rest: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        norm(32),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        norm(64),
        activation(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        *rest,
        nn.Linear(256, 10),
    )


def by_hand() -> dict[str, nn.Module]:
    """Small networks as people write them."""

    def none(_: int) -> nn.Module:
        return nn.Identity()

    return {
        "logistic regression": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        "MLP": nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
        "MLP, sigmoid": nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Sigmoid(), nn.Linear(128, 10)),
        "CNN, ReLU": _convolutions(nn.ReLU, none),
        "CNN, tanh": _convolutions(nn.Tanh, none),
        "CNN, GELU": _convolutions(nn.GELU, none),
        "CNN, leaky ReLU, BatchNorm": _convolutions(nn.LeakyReLU, nn.BatchNorm2d),
        "CNN, GroupNorm": _convolutions(nn.SiLU, lambda width: nn.GroupNorm(4, width)),
        "CNN, InstanceNorm": _convolutions(nn.ReLU, nn.InstanceNorm2d),
        "CNN, dropout": _convolutions(nn.ReLU, nn.BatchNorm2d, nn.Dropout(0.5)),
        "CNN, log-softmax": nn.Sequential(_convolutions(nn.ReLU, none), nn.LogSoftmax(dim=1)),
        "LSTM": _Columns(),
    }


def bare() -> dict[str, nn.Module]:
    """Small networks whose gradient is zero at more pixels: a maximum first, no bias, no normalisation."""

    def block(width: int, out: int, bias: bool) -> list[nn.Module]:
        return [nn.Conv2d(width, out, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2)]

    def vgg(bias: bool) -> nn.Module:
        blocks = [*block(1, 16, bias), *block(16, 32, bias), *block(32, 64, bias)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 10, bias=bias))

    return {
        "bare VGG": vgg(True),
        "bare VGG, no bias": vgg(False),
        "bare MLP, no bias": nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False)
        ),
        "bare CNN, max-pool first": nn.Sequential(
            nn.MaxPool2d(2, 1), *block(1, 32, True), nn.Flatten(), nn.Linear(288, 10)
        ),
        "bare CNN, four channels": nn.Sequential(*block(1, 4, True), nn.Flatten(), nn.Linear(64, 10)),
    }


def fitted(model: nn.Module, data: Data, epochs: int = 30, eps: float = 0.0) -> nn.Module:
    """``model`` after Adam on the training images; against PGD of 5 steps within ``eps`` where it is not 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # some networks have .01, and their statistics need thousands of steps
    images, labels = to_images(data.train.images), data.train.labels
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=draws).split(64):
            if len(chosen) < 2:
                continue
            x, y = images[chosen], labels[chosen]
            if eps:
                model.eval()
                shift = torch.empty_like(x).uniform_(-eps, eps, generator=draws)
                for _ in range(5):
                    shift.requires_grad_()
                    (towards,) = torch.autograd.grad(F.cross_entropy(model((x + shift).clamp(0, 1)), y), shift)
                    shift = (shift.detach() + eps / 2 * towards.sign()).clamp(-eps, eps)
                x = (x + shift).clamp(0, 1)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def coloured(digits: Data, classes: int = 10) -> Data:
    """Digits in three tints at 32x32; with a hundred classes, by the digit and the tint."""
    draws = torch.Generator().manual_seed(1)

    def split(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        large = F.interpolate(to_images(images), size=(SIDE, SIDE), mode="bilinear")
        tint = torch.randint(10, (len(labels),), generator=draws)
        angle = tint[:, None] * 0.6283 + torch.tensor([0.0, 2.0944, 4.1888])
        colour = (0.6 + 0.4 * angle.cos())[:, :, None, None]
        return (255 * large * colour).round().to(torch.uint8), labels * (classes // 10) + (tint if classes > 10 else 0)

    train_images, train_labels = split(digits.train.images, digits.train.labels)
    test_images, test_labels = split(digits.test.images, digits.test.labels)
    return make(
        f"npz:tints-{classes}",
        (train_images.numpy(), train_labels.numpy()),
        (test_images.numpy(), test_labels.numpy()),
    )


def models(folder: Path) -> Iterator[tuple[str, Callable[[], Model]]]:
    """Name and maker of every sound model."""
    digits = load("digits")
    tints, hundred = coloured(digits), coloured(digits, 100)

    def plain(network: nn.Module, epochs: int = 30, eps: float = 0.0) -> Model:
        return fitted(network, digits, epochs, eps), digits

    def named(name: str, data: Data, epochs: int, eps: float = 0.0) -> Model:
        return fitted(build(data.model(name), 0), data, epochs, eps), data

    torch.manual_seed(0)
    for name, network in by_hand().items():
        yield name, lambda network=network: plain(network)
    for name in ("CNN, ReLU", "MLP", "CNN, GroupNorm"):
        yield f"{name}, adversarially trained", lambda name=name: plain(by_hand()[name], 30, 0.1)
    for name in ("resnet8", "resnet20"):
        yield f"{name}", lambda name=name: named(name, digits, 12)
        yield f"{name}, adversarially trained", lambda name=name: named(name, digits, 12, 0.1)
    yield "resnet8, ten tints", lambda: named("resnet8", tints, 8)
    yield "resnet8, a hundred classes", lambda: named("resnet8", hundred, 30)
    yield (
        "ensemble of 3 by hand",
        lambda: (Ensemble([plain(by_hand()[name])[0] for name in list(by_hand())[3:6]]), digits),
    )
    for name in [
        "resnet18",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "regnet_y_400mf",
        "mnasnet0_5",
        "efficientnet_b0",
    ]:
        yield f"torchvision/{name}", lambda name=name: named(f"torchvision/{name}", tints, 12)
    for name in [
        "resnet10t",
        "mobilenetv3_small_050",
        "lcnet_050",
        "ghostnet_050",
        "resnet18",
        "semnasnet_050",
        "hardcorenas_a",
        "repvgg_a0",
        "tinynet_e",
    ]:
        yield f"timm/{name}", lambda name=name: named(f"timm/{name}", tints, 12)
    for name, network in bare().items():
        yield name, lambda network=network: plain(network)
    for defense in ("baseline", "adp", "gal", "dverge", "advt", "dverge-advt"):
        yield f"robench train {defense} --n 2", lambda defense=defense: (_trained(defense, folder, digits), digits)
    if SHARED.is_dir():
        lossless = load(f"npz:{SHARED / 'cifar10-lossless-subset.npz'}")
        files = {path.stem: [path] for path in sorted((SHARED / "checkpoints").glob("*.pth"))}
        files["advoap-8-resnet20"] = sorted((SHARED / "advoap").glob("*.pth"))
        for stem, paths in files.items():
            if paths:
                yield f"published {stem}", lambda stem=stem, paths=paths: (_imported(paths, stem, folder), lossless)
                yield (
                    f"published {stem}, member 1",
                    lambda stem=stem, paths=paths: (_imported(paths, stem, folder).members[0], lossless),
                )


def _trained(defense: str, folder: Path, data: Data) -> Ensemble:
    line = f"train {defense} --n 2 --model resnet8 --dataset digits --epochs 10 --init scratch --runs {folder}"
    with redirect_stdout(StringIO()):
        robench_command(line.split())
    return next(run for run in Runs(folder).all() if run.defense == defense).load()


def _imported(paths: list[Path], name: str, folder: Path) -> Ensemble:
    store = Runs(folder)
    if name not in store.names():
        import_weights(
            paths,
            store,
            model="resnet20",
            dataset="cifar10",
            defense="unknown",
            seed=0,
            role="target",
            name=name,
            parent=None,
            data_folder=Path("data"),
            normalisation=((0.0,) * 3, (1.0,) * 3) if "advoap" in name else None,
        )
    return store.get(name).load()


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="results/false_alarms.md", show_default=True)
@click.option("--only", default="", help="Models whose name contains this.")
@click.option("--samples", default=200, show_default=True)
def main(out: Path, only: str, samples: int) -> None:
    torch.set_num_threads(1)
    lines, alarms, count, began = [], 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, maker in models(Path(folder)):
            if only not in name:
                continue
            model, data = maker()
            count += 1
            radius = (0.1,) if "digits" in data.name or "tints" in data.name else (0.01,)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", robench.DoubtWarning)
                found = robench.evaluate(model, data, robench.Whitebox(eps=radius, restarts=1), samples=samples)
            table = found.accuracy(["threat"]).set_index("threat")["accuracy"]
            told = [str(each) for each in found.checks if each.status != "pass"]
            told += [f"doctor: {finding}" for finding in diagnose(model, data)]
            alarms += bool(told)
            scores = f"{table['clean']:.1%} | {table['whitebox']:.1%}"
            lines.append(f"| {name} | {scores} | {'; '.join(told) or 'nothing'} |")
            click.echo(f"{time.perf_counter() - began:5.0f} s  {lines[-1]}")
    head = f"{count} sound models, {samples} images each, white-box PGD: something is said of {alarms}."
    table_head = "| model | clean | attacked | what is said |\n|---|---|---|---|"
    write_text(out, "\n".join(["# False alarms", "", head, "", table_head, *lines, ""]))


if __name__ == "__main__":
    main()
