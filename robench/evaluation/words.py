"""What users write for radii and attacks, understood."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

from robench.attacks import ATTACKS, Attack
from robench.core.errors import RobenchError, unknown
from robench.core.losses import LOSSES
from robench.core.plugins import construct
from robench.evaluation.schema import PROTOCOL, Asked, Effort


def radii(text: str) -> tuple[float, ...]:
    """``0.01:0.07:0.01`` (the last one included), ``8/255``, or several with commas: ascending, without repeats.

    Raises:
        RobenchError: not numbers, or outside [0, 1].
    """
    found: set[Fraction] = set()
    for part in text.split(","):
        try:
            numbers = [Fraction(piece.strip()) for piece in part.split(":")]
            if len(numbers) == 3:
                first, last, step = numbers
                if step <= 0 or last < first or (last - first) / step > 1000:
                    raise ValueError("the step must lead from the first to the last")
                found.update(first + step * i for i in range(int((last - first) / step) + 1))
            elif len(numbers) == 1:
                found.add(numbers[0])
            else:
                raise ValueError("a range is FIRST:LAST:STEP")
        except (ValueError, ZeroDivisionError) as error:
            raise RobenchError(
                f"expected `eps` such as 0.03, 8/255 or 0.01:0.07:0.01, got {part!r} ({error})"
            ) from error
    if min(found) <= 0 or max(found) > 1:
        raise RobenchError(
            f"expected `eps` in (0, 1], in units of a pixel in [0, 1], got {text!r}; "
            f"clean accuracy is always reported, and 8/255 is a radius of 8 grey levels"
        )
    return tuple(float(value) for value in sorted(found))


def radius(eps: float) -> str:
    """A text that `radii` reads as this ε and as no other: ``0.03``; ``8/255`` of grey levels; else every digit."""
    short = f"{eps:g}"
    if float(short) == eps:
        return short
    levels = round(255 * eps)
    return f"{levels}/255" if levels / 255 == eps else repr(float(eps))


def numbers(values: Iterable[float]) -> str:
    """With commas, as options take them."""
    return ",".join(f"{value:g}" for value in values)


def attacks(
    threat: str, names: Sequence[str] = (), losses: Sequence[str] = (), steps: int | None = None
) -> tuple[Attack, ...]:
    """Attacks for a threat, each with each loss.

    Args:
        names: such as ``pgd`` or ``pgd:momentum=1:steps=20``; the protocol's by default. A protocol's attack keeps
            the protocol's fields for this threat.
        losses: the protocol's by default.
        steps: for all attacks.

    Raises:
        RobenchError: unknown attack, loss or field.
    """
    protocol, usual, _ = PROTOCOL[threat]
    chosen: list[tuple[str, dict[str, object]]] = [] if names else [(name, dict(fields)) for name, fields in protocol]
    for text in names:
        name, *pairs = text.split(":")
        own = [fields for each, fields in protocol if each == name]
        # Where the protocol has an attack several times, its name does not say which of them.
        values: dict[str, object] = dict(own[0]) if len(own) == 1 else {}
        for pair in pairs:
            field, equals, value = pair.partition("=")
            if not equals:
                raise RobenchError(f"expected NAME:FIELD=VALUE in attack {text!r}, got {pair!r}")
            if field == "loss" or (field == "steps" and steps is not None):
                plural = "losses" if field == "loss" else "steps"
                raise RobenchError(
                    f"`{field}` of attack {text!r} is said by `{plural}`, for all attacks; leave one away"
                )
            values[field] = value
        chosen.append((name, values))
    for loss in losses:
        if loss not in LOSSES.names():
            raise unknown("loss", loss, LOSSES.names())
    more = {} if steps is None else {"steps": steps}
    return tuple(
        construct(ATTACKS.get(name), {**values, **more, "loss": loss}, f"attack {name!r}")
        for name, values in chosen
        for loss in losses or usual
    )


def options(threat: str, asked: Asked, usual: Sequence[float]) -> dict[str, Any]:
    """The fields of a threat of `robench.evaluation.threats`, surrogates aside, from what a study or a command line
    says.

    Args:
        usual: ε where none is said.

    Raises:
        RobenchError: what cannot be understood.
    """
    more = {
        name: value for name, field in Effort.model_fields.items() if (value := getattr(asked, name)) != field.default
    }
    return {
        "eps": radii(asked.eps) if isinstance(asked.eps, str) else tuple(sorted(asked.eps or usual)),
        "attacks": attacks(threat, asked.attacks or (), asked.losses or (), asked.steps),
        "restarts": PROTOCOL[threat].restarts,
        **more,
    }


def steps(label: str) -> int:
    """Gradient steps, or queries, of an attack by its label in the rows, such as ``pgd:steps=500``; 1 where it says
    nothing."""
    name, *pairs = label.split(":")
    given = dict(pair.partition("=")[::2] for pair in pairs)
    kind = None
    with suppress(RobenchError):  # installed, and does not load
        kind = ATTACKS.get(name) if name in ATTACKS.names() else None
    return int(
        next((given[each] for each in _EFFORT if each in given), 0)
        or next((getattr(kind, each) for each in _EFFORT if hasattr(kind, each)), 1)
    )


#: Fields that say how much an attack tries.
_EFFORT = ("steps", "queries")
