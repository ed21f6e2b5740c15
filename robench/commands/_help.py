"""Help in groups, with examples at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import click

from robench.commands._shared import PLACES, refuse_given
from robench.core.errors import unknown


class Examples(click.Command):
    """A command whose help ends with command lines that a reader may copy; a test runs each."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """UsageError for an option that is given twice: click keeps the last without a word."""
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
            for option, count in Counter(given).items():
                if count > 1 and isinstance(option, click.Option) and not (option.multiple or option.is_flag):
                    raise click.UsageError(
                        f"expected {option.opts[0]} once, got it {count} times; omit all but one (where several values "
                        f"are allowed, they go with commas)",
                        ctx,
                    )
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:  # whole, however long, so that it can be copied
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Sections(Examples, click.Group):
    """Commands that are listed by what they are for, each with its whole first sentence."""

    def __init__(self, *arguments: Any, sections: Mapping[str, Sequence[str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sections = sections

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.list_commands(ctx) and not name.startswith("-") and not ctx.resilient_parsing:
            raise unknown("command", name, self.list_commands(ctx), f"`{ctx.command_path} -h` lists all.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.list_commands(ctx)))
        for title, names in self.sections.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{name:{width}}", each.get_short_help_str(200)) for name, each in found if each is not None]
                )


class Group(NamedTuple):
    """Options that help lists together: what they are about, their names, the threats under which they have an effect,
    where it is not all of them."""

    title: str
    names: Sequence[str]
    under: Sequence[str] = ()

    @property
    def heading(self) -> str:
        return f"{self.title} (--threat {', '.join(self.under)})" if self.under else self.title


class Grouped(Examples):
    """A command whose options are listed in groups; where things lie is the last of them."""

    def __init__(self, *arguments: Any, groups: Sequence[Group] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.groups = (*groups, Group("Where", PLACES))

    def refuse_others(self, threat: str) -> None:
        """RobenchError for an option that was given and has no effect under ``threat``."""
        for group in self.groups:
            if group.under and threat not in group.under:
                refuse_given(set(group.names), f"has no effect under --threat {threat}")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section per heading; what is in no group comes first."""
        heading = {name: group.heading for group in self.groups for name in group.names}
        sections: dict[str, list[tuple[str, str]]] = {
            title: [] for title in ("Options", *(group.heading for group in self.groups))
        }
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None:
                sections[heading.get(option.name or "", "Options")].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
