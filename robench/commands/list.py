"""`robench list`."""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import Any

import click

from robench.commands._help import Grouped
from robench.commands._shared import shared
from robench.core.errors import RobenchError

_KINDS = ["defenses", "attacks", "losses", "models", "datasets", "logs", "figures", "runs"]
_EXAMPLES = (
    "robench list attacks",
    "robench list defenses --markdown",
)


@click.command("list", cls=Grouped, examples=_EXAMPLES)
@click.argument("what", required=False, type=click.Choice(_KINDS))
@click.option("--markdown", is_flag=True, help="Tables for a README; of all but runs.")
@shared("runs")
def command(what: str | None, markdown: bool, runs: str) -> None:
    """What there is: defenses, attacks, losses, models, datasets, logs, figures, runs."""
    from robench.core.logbook import LOGS
    from robench.core.losses import LOSSES
    from robench.core.registry import Registry
    from robench.store.runs import Runs
    from robench.validity.conformance import REGISTRIES

    if markdown and what == "runs":
        raise RobenchError("expected --markdown with anything but runs; robench show has them")

    registries: list[Registry[Any]] = [
        REGISTRIES["defense"], REGISTRIES["attack"], LOSSES, REGISTRIES["model"], REGISTRIES["dataset"], LOGS
    ]  # fmt: skip
    if what in (None, "figures"):  # a second that the others do not wait for
        from robench.reports.sheet import FIGURES

        registries.append(FIGURES)
    for registry in registries:
        if what not in (None, registry.plural):
            continue
        broken = registry.broken()
        names = [name for name in registry.names() if name not in broken]
        if markdown:
            click.echo(_table(registry.kind, {name: _summary(registry.get(name)) for name in names}))
            continue
        indent = max(16, *map(len, names))
        lines = [_entry(name, _summary(registry.get(name)), indent) for name in names]
        if what:
            for prefix, members in registry.families().items():
                here = f"{len(members)} names: {', '.join(members)}" if members else "none: its package does not import"
                lines.append(f"  {prefix}/<name>   {here}")
        else:
            lines += [
                f"  {prefix}/<name>   robench list {registry.plural} names them" for prefix in registry.prefixes()
            ]
        if registry.kind == "dataset":
            lines += [
                "  folder:PATH      train/<class>/* and test/<class>/*",
                "  npz:PATH         x_train y_train x_test y_test",
                "  cifar10-c:C/S    CIFAR-10 under corruption C of severity S, 1 to 5, to judge on; cifar100-c too",
                "  hf:OWNER/NAME    Parquet files on Hugging Face, with columns of images and labels",
            ]
        click.echo(f"{registry.plural}:\n" + "\n".join(lines))
        for name, reason in broken.items():
            click.echo(f"  {name}: skipped. {reason}", err=True)
    if what in (None, "runs") and not markdown:
        store = Runs(runs)
        found = store.all()
        none = f"runs: none in {runs}; {store.elsewhere() or 'robench train makes one'}"
        click.echo("runs:" if found or what is None else none)
        indent = max(44, *(len(each.name) for each in found), 0)
        for each in found:
            about = f"{each.role:<9} {each.defense} n={each.n} seed={each.seed} {each.data_name}"
            click.echo(f"  {each.name:<{indent}} {about.rstrip()}")


def _table(kind: str, summaries: dict[str, str]) -> str:
    """A Markdown table, whose addresses are links."""
    from robench.reports.document import escape_markdown

    rows = []
    for name, summary in summaries.items():
        # Addresses and code stand as they are, what is between them is escaped.
        parts = re.split(r"(https?://[^\s),;]+|``[^`]+``)", summary)
        shown = [
            (f"`{part.strip('`')}`" if part.startswith("``") else f"<{part}>")
            if place % 2
            else f"{' ' * part.startswith(' ')}{escape_markdown(part)}{' ' * (part != ' ' and part.endswith(' '))}"
            for place, part in enumerate(parts)
        ]
        rows.append(f"| `{name}` | {''.join(shown).strip()} |\n")
    return f"| {kind} | |\n|---|---|\n{''.join(rows)}"


def _entry(name: str, summary: str, indent: int) -> str:
    """A name and what it is, in lines of the terminal's width."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    first, other = f"  {name:<{indent}} ", " " * (indent + 3)
    return textwrap.fill(summary, width, initial_indent=first, subsequent_indent=other) or f"  {name}"


def _summary(item: Any) -> str:
    """The first paragraph of what a plug-in says of itself."""
    return " ".join((getattr(item, "func", item).__doc__ or "").strip().partition("\n\n")[0].split())
