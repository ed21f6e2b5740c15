"""Options made of a schema's fields, and help in groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import click
from pydantic import ValidationError

from robench.commands._shared import refuse_given, split
from robench.core.plugins import explained
from robench.evaluation.schema import NAMES, Validated

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

T = TypeVar("T", bound=Validated)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Group(NamedTuple):
    """Options that help lists together: what they are about, the threats under which they have an effect, names."""

    title: str
    under: tuple[str, ...]
    names: Sequence[str]

    @classmethod
    def of(cls, kind: type[Validated]) -> Group:
        return cls(kind.group, kind.under, list(kind.model_fields))

    @property
    def heading(self) -> str:
        return self.title if self.under == NAMES else f"{self.title} (--threat {', '.join(self.under)})"


class Grouped(click.Command):
    """A command whose options belong to threats."""

    def __init__(self, *arguments: Any, groups: Sequence[Group], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.groups = groups

    def refuse_others(self, threat: str) -> None:
        """RobenchError for an option that was given and has no effect under ``threat``."""
        for group in self.groups:
            if threat not in group.under:
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
            with formatter.section(title):
                formatter.write_dl(records)


def fields_of(*kinds: type[Validated]) -> Decorator:
    """An option for each field of ``kinds``."""
    made = [_option(name, field) for kind in kinds for name, field in kind.model_fields.items()]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(made):
            function = option(function)
        return function

    return decorate


def taken(kind: type[T], given: dict[str, Any], owner: str) -> T:
    """The fields of ``kind``, taken out of what the user typed.

    Raises:
        RobenchError: a value out of range.
    """
    try:
        return kind(**{name: given.pop(name) for name in kind.model_fields})
    except ValidationError as error:
        raise explained(error, owner, kind) from error


def _several(numbers: bool) -> Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...] | None]:
    """Understands values with commas between them."""

    def understood(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[Any, ...] | None:
        if text is None:
            return None
        return tuple(int(part) if numbers and part.lstrip("-").isdecimal() else part for part in split(text))

    return understood


def _option(name: str, field: FieldInfo) -> Decorator:
    about: dict[str, Any] = {"help": field.description, "default": field.default}
    kinds = _alternatives(field.annotation)
    if bool in kinds:
        about["is_flag"] = True
    elif literal := [kind for kind in kinds if get_origin(kind) is Literal]:
        about["type"] = click.Choice(get_args(literal[0]))
    elif int in kinds:
        about["type"] = int
    elif str not in kinds:
        (values,) = (get_args(kind) for kind in kinds if get_origin(kind) is tuple)
        about["callback"] = _several(int in _alternatives(values[0]))
        about["default"] = ",".join(map(str, field.default)) if field.default else None
    shown = about["default"] is not None and bool not in kinds
    return click.option(f"--{name.replace('_', '-')}", show_default=shown, **about)


def _alternatives(annotation: Any) -> list[Any]:
    """What a value may be, but None."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for each in get_args(annotation) for kind in _alternatives(each) if kind is not type(None)]
    return [annotation]
