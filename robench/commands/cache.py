"""`robench cache`."""

from __future__ import annotations

from pathlib import Path

import click

from robench.commands._help import Grouped
from robench.commands._shared import shared

_EXAMPLES = ("robench cache list",)


@click.command("cache", cls=Grouped, examples=_EXAMPLES)
@click.argument("action", type=click.Choice(["list", "verify", "clear"]))
@shared("runs")
def command(action: str, runs: str) -> int:
    """The adversarial images that are kept: list them, verify every file, or clear all."""
    from robench.evaluation.images import Images
    from robench.session import CRAFTED

    images = Images(Path(runs) / CRAFTED)
    if action == "clear":
        click.echo(f"freed {images.clear() / 1e6:.1f} MB")
        return 0
    crafts = list(images.crafts(verify=action == "verify"))
    for craft in crafts:
        what = " ".join(str(craft.manifest.get(name, "?")) for name in ("surrogate", "attack", "loss", "eps"))
        damaged = f"  {craft.damaged} damaged" if craft.damaged else ""
        click.echo(f"{craft.key}  {craft.images:>6} images  {craft.size / 1e6:8.1f} MB  {what}{damaged}")
    click.echo(f"{len(crafts)} crafts, {sum(craft.size for craft in crafts) / 1e6:.1f} MB")
    return int(any(craft.damaged for craft in crafts))
