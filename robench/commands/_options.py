"""Options made of a schema's fields."""

from __future__ import annotations

from collections.abc import Callable
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import ValidationError

from robench.commands._help import Group
from robench.commands._shared import split
from robench.core.plugins import explained
from robench.evaluation.schema import NAMES, Validated

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

T = TypeVar("T", bound=Validated)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def group_of(kind: type[Validated]) -> Group:
    """The fields of ``kind``, for help."""
    return Group(kind.group, list(kind.model_fields), () if kind.under == NAMES else kind.under)


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
