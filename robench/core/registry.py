"""One registry for attacks, defenses, models and data sets: register, look up, third parties' entry points."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from robench.core.errors import RobenchError, in_a_line, unknown

#: The defense that is none, its members trained alone: what others start from, and the usual surrogates.
UNDEFENDED = "baseline"

T = TypeVar("T")
U = TypeVar("U")


class Registry(Generic[T]):
    """Names of one kind of plug-in.

    Args:
        kind: singular noun for messages, such as ``"attack"``.
        package: package whose modules register on import; every file in it whose name does not begin with ``_``
            is imported at the first look-up, so that a new file is all a newcomer adds.
        group: entry-point group through which installed third-party packages add names.
        own: what an unknown name is told of the user's own.
    """

    def __init__(
        self,
        kind: str,
        *,
        group: str,
        package: str | None = None,
        own: str = "one of your own is installed first: pip install -e FOLDER",
    ) -> None:
        self.kind = kind
        self._own = own
        self._package = package
        self._group = group
        self._items: dict[str, T] = {}
        self._families: dict[str, tuple[Callable[[str], T], Callable[[], Iterable[str]]]] = {}
        self._loaded: set[str] = set()
        self._discovered = False

    def register(self, name: str) -> Callable[[U], U]:
        """Decorator that registers under ``name``; a name that is taken raises, whoever took it.

        A class learns its name as its attribute ``name``.
        """

        def add(item: U) -> U:
            if name in self._items:
                raise RobenchError(f"{self.kind} {name!r} is registered twice; give the second another name")
            self._add(name, item)
            return item

        return add

    def family(self, prefix: str, resolve: Callable[[str], T], names: Callable[[], Iterable[str]]) -> None:
        """Registers every ``prefix/<name>`` at once: ``resolve`` makes the item, ``names`` lists what there is.

        Both raise RobenchError where the package behind them does not import.
        """
        if prefix in self._families:
            raise RobenchError(f"{self.kind} family {prefix!r} is registered twice; give the second another name")
        self._families[prefix] = (resolve, names)

    @property
    def plural(self) -> str:
        """The kind's, as `robench list` takes it."""
        return f"{self.kind}es" if self.kind.endswith("s") else f"{self.kind}s"

    def get(self, name: str) -> T:
        """The item called ``name``.

        Raises:
            RobenchError: no such name (with the nearest ones), or a third-party plug-in that fails to load.
        """
        self._discover()
        if name in self._items:
            return self._items[name]
        prefix, _, rest = name.partition("/")
        if rest and prefix in self._families:
            return self._families[prefix][0](rest)
        points = self._points()
        if name in points:
            return self._load(points[name])
        families = ", ".join(f"{each}/NAME" for each in sorted(self._families))
        there = f"all, with {families}" if families else "all"
        hint = f"`robench list {self.plural}` shows {there}; {self._own}."
        raise unknown(self.kind, name, self.names(), hint)

    def names(self) -> list[str]:
        """Every name that stands by itself; families are listed by `families`."""
        self._discover()
        return sorted({*self._items, *self._points()})

    def prefixes(self) -> list[str]:
        """The families; unlike `families`, this imports no package of theirs."""
        self._discover()
        return list(self._families)

    def families(self) -> dict[str, list[str]]:
        """Per family prefix the names that it resolves here; none where its package does not import."""
        found: dict[str, list[str]] = {prefix: [] for prefix in self.prefixes()}
        for prefix, (_, names) in self._families.items():
            with suppress(RobenchError):
                found[prefix] = sorted(names())
        return found

    def broken(self) -> dict[str, str]:
        """Third-party plug-ins that fail to load, with the reason."""
        reasons = {}
        for name, point in self._points().items():
            try:
                self._load(point)
            except RobenchError as error:
                reasons[name] = str(error)
        return reasons

    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self._group)}

    def _load(self, point: EntryPoint) -> T:
        if point.name in self._loaded:
            return self._items[point.name]
        rivals = {other.value for other in entry_points(group=self._group) if other.name == point.name}
        if len(rivals) > 1:
            raise RobenchError(
                f"{self.kind} {point.name!r} is registered by {' and by '.join(sorted(rivals))}; uninstall one of them"
            )
        package = point.dist.name if point.dist else point.value
        before = self._items.get(point.name)
        try:
            item = point.load()
        except Exception as error:
            raise RobenchError(
                f"{self.kind} {point.name!r} of package {package!r} fails to load ({in_a_line(error)}); "
                f"repair or uninstall that package"
            ) from error
        if before is not None and before is not item and getattr(before, "__module__", None) != point.module:
            raise RobenchError(
                f"{self.kind} {point.name!r} of package {package!r} has a name that is taken; "
                f"rename it there or uninstall that package"
            )
        # The module may have registered itself with the decorator while it was imported.
        if point.name not in self._items:
            self._add(point.name, item)
        self._loaded.add(point.name)
        return self._items[point.name]

    def _add(self, name: str, item: object) -> None:
        if isinstance(item, type):
            item.name = name  # type: ignore[attr-defined]
        self._items[name] = cast(T, item)

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        if self._package is None:
            return
        try:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                if not module.name.startswith("_"):
                    importlib.import_module(f"{self._package}.{module.name}")
        except BaseException:
            self._discovered = False  # the next look-up fails alike, instead of with half of the names
            raise
