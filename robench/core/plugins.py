"""Plug-in dataclasses made from names and values that users or files wrote."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from fractions import Fraction
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from robench.core.errors import RobenchError, unknown

_FINITE = ConfigDict(allow_inf_nan=False)


def construct(cls: type[Any], values: Mapping[str, Any], owner: str) -> Any:
    """A plug-in dataclass from named values, strings converted to the fields' types, such as ``8/255`` to a float.

    Raises:
        RobenchError: unknown name or a value of the wrong type.
    """
    known = _adapters(cls)  # type: ignore[arg-type]  # a class is hashable
    converted = {}
    for name, value in values.items():
        if name not in known:
            raise unknown(f"field of {owner}", name, known)
        try:
            converted[name] = known[name].validate_python(value)
        except ValidationError as error:
            raise explained(error, owner, field=name) from error
    return cls(**converted)


@cache
def _adapters(cls: type[Any]) -> dict[str, TypeAdapter[Any]]:
    """What converts to the type of each field."""
    hints = get_type_hints(cls)
    number: Any = Annotated[float, BeforeValidator(_divided)]
    kinds = {name: number if kind is float else kind for name, kind in hints.items()}
    return {field.name: TypeAdapter(kinds[field.name], config=_FINITE) for field in fields(cls)}


def _divided(value: Any) -> Any:
    """The number that a text such as ``8/255`` is; anything else as it was."""
    if isinstance(value, str) and "/" in value:
        with suppress(ValueError, ZeroDivisionError):
            return float(Fraction(value))
    return value


def explained(
    error: ValidationError, owner: str, model: type[BaseModel] | None = None, *, field: str = ""
) -> RobenchError:
    """One line for the first problem that pydantic found: field, owner, what is allowed, what was received, and what
    the field's description says.

    Args:
        model: what did not validate; field: or the one value of ``owner`` that did not.
    """
    problem = error.errors()[0]
    if isinstance(said := problem.get("ctx", {}).get("error"), RobenchError):
        return said
    loc = [field, *problem["loc"]] if field else problem["loc"]
    name, known = str(loc[0]) if loc else "", model.model_fields if model else {}
    if problem["type"] == "extra_forbidden":
        return unknown(f"field of {owner}", name, known)
    got = "" if problem["type"] == "missing" else f", got {' '.join(repr(problem['input']).split())[:200]}"
    owners = (base.model_fields for base in (model.__mro__ if model else ()) if issubclass(base, BaseModel))
    hint = next((fields[name].description for fields in owners if name in fields and fields[name].description), "")
    message = problem["msg"].lower().removeprefix("value error, ")
    return RobenchError(f"{name!r} of {owner}: {message}{got}{f'; {hint}' if hint else ''}")
