"""What each choice in `robench.core.fast` is worth: one PGD step, choice after choice, measured in turns.

    python benchmarks/choices.py --run dverge-3 --dataset npz:cifar10.npz --compile

`--compile` adds torch.compile, which takes a minute or more of compiling and a C++ compiler.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from statistics import median

import click
import torch
from speed import measure, published
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from robench.attacks.ascent import ascend
from robench.commands._shared import dataset_of, device_of
from robench.core.data import load
from robench.core.ensemble import Ensemble, mixture
from robench.core.fast import attackable, has_bfloat16
from robench.core.files import write_text
from robench.core.frozen import full_float32
from robench.core.losses import cross_entropy
from robench.store.runs import Runs


class Stacked(nn.Module):
    """Members of one architecture as one: their weights stacked, one vectorised forward pass."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.weights, self.buffers_ = stack_module_state(list(ensemble.members))
        self.weights = {name: weight.detach() for name, weight in self.weights.items()}
        self.template = [copy.deepcopy(ensemble.members[0]).to("meta")]

    def forward(self, images: Tensor) -> Tensor:
        def one(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return functional_call(self.template[0], (weights, buffers), (images,))  # type: ignore[no-any-return]

        return mixture(vmap(one)(self.weights, self.buffers_))


def frozen_copy(ensemble: Ensemble) -> Ensemble:
    return copy.deepcopy(ensemble).eval().requires_grad_(False)


def overwriting(model: nn.Module) -> nn.Module:
    """Every ReLU in place."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return model


def cast(model: nn.Module) -> nn.Module:
    """Weights in bfloat16 once, instead of by autocast at every pass."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.bfloat16()
    return model


@click.command()
@click.option("--run", "name", required=True)
@click.option("--dataset", help="By default the one that the run was trained on.")
@click.option("--images", default=100, show_default=True)
@click.option("--steps", default=2, show_default=True, help="In a turn.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--compile", "compiling", is_flag=True)
@click.option("--runs", default="runs", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for choices.md.")
def main(
    name: str,
    dataset: str | None,
    images: int,
    steps: int,
    rounds: int,
    compiling: bool,
    runs: str,
    device: str,
    out: Path | None,
) -> None:
    run = Runs(runs).get(name)
    data, place = load(dataset or dataset_of([run])), device_of(device)
    if place.type == "cpu":
        torch.set_num_threads(1)
    ensemble = run.load().to(place)
    plan = measure.Plan(ensemble=ensemble, data=data, device=place, images=images)
    x, y = plan.batch(images)
    radius = torch.full((len(x),), plan.eps, device=place)
    last = {"float32": frozen_copy(ensemble).to(memory_format=torch.channels_last)}
    folded = attackable(ensemble, x, "float32")
    models: dict[str, nn.Module] = {
        "gradient of the input alone": frozen_copy(ensemble),
        "+ channels_last": last["float32"],
        "+ BatchNorm folded = robench float32": folded,
        "float32, ReLU in place": overwriting(folded),
        "float32, members stacked by vmap": Stacked(frozen_copy(folded)),  # type: ignore[arg-type]
    }
    if compiling:
        models["float32, torch.compile"] = torch.compile(folded)  # type: ignore[assignment]
    if has_bfloat16(place):
        half = attackable(ensemble, x, "bfloat16")
        models["+ bfloat16 = robench bfloat16"] = half
        models["bfloat16, weights cast once"] = cast(half)
        models["bfloat16, ReLU in place"] = overwriting(half)
        if compiling:
            models["bfloat16, torch.compile"] = torch.compile(half)  # type: ignore[assignment]
    near = x.contiguous(memory_format=torch.channels_last)

    def step(model: nn.Module, at: Tensor) -> Tensor:
        return ascend(lambda z, _: cross_entropy(model(z), y), at, radius, steps=steps, step_ratio=0.2)

    calls = {
        "authors' way": partial(
            published.ascend, published.Averaged(ensemble), x, y, plan.eps, steps=steps, step_ratio=0.2
        )
    }
    calls |= {
        title: partial(step, model, x if title == "gradient of the input alone" else near)
        for title, model in models.items()
    }
    with full_float32():
        times = measure.in_turns(calls, rounds, place)
    lines = ["| | s per step | times faster |", "|---|---|---|"]
    for title, own in times.items():
        ratio = median(theirs / ours for theirs, ours in zip(times[measure.AUTHORS], own, strict=True))
        lines.append(f"| {title} | {median(own) / steps:.3f} | {ratio:.2f} |")
    what = f"One PGD step on {len(x)} images, {run.name} ({run.n} members), {data.label}"
    head = f"{what}; medians of {rounds} rounds in turns."
    text = "\n".join([head, "", *lines, ""])
    if out:
        write_text(out / "choices.md", text)
    click.echo(text)


if __name__ == "__main__":
    main()
