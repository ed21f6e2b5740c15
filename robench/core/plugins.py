"""Plug-in dataclasses made from names and values that users or files wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from robench.core.errors import RobenchError, unknown

_FINITE = ConfigDict(allow_inf_nan=False)


def construct(cls: type[Any], values: Mapping[str, Any], owner: str) -> Any:
    """A plug-in dataclass from named values, strings converted to the fields' types.

    Raises:
        RobenchError: unknown name or a value of the wrong type.
    """
    known = {field.name: field for field in fields(cls)}
    hints = get_type_hints(cls)
    converted = {}
    for name, value in values.items():
        if name not in known:
            raise unknown(f"field of {owner}", name, known)
        try:
            converted[name] = TypeAdapter(hints[name], config=_FINITE).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]
            raise RobenchError(f"{name!r} of {owner}: {problem['msg'].lower()}, got {value!r}") from error
    return cls(**converted)
