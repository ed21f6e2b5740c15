"""`robench init`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robench.commands._help import Grouped
from robench.core.errors import RobenchError

if TYPE_CHECKING:
    from robench.validity.conformance import Kind

#: The template's file and class, by what they are a plug-in of.
_TEMPLATE = {"defense": ("noise", "Noise", "example-noise"), "attack": ("fgsm", "FGSM", "example-fgsm")}


_EXAMPLES = (
    "robench init my-defense",
    "robench init my-attack --attack",
)


@click.command("init", cls=Grouped, examples=_EXAMPLES)
@click.argument("name")
@click.option("--attack", is_flag=True, help="An attack; by default a defense.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the package; by default NAME.")
def command(name: str, attack: bool, out: Path | None) -> None:
    """Write a package with a defense of your own, NAME, ready to be installed, checked and changed."""
    from importlib.util import find_spec

    from robench.validity.conformance import REGISTRIES

    kind: Kind = "attack" if attack else "defense"
    folder, module = out or Path(name), name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise RobenchError(
            f"expected NAME of lower-case letters, digits and single hyphens, such as my-{kind}, got {name!r}"
        )
    if name in REGISTRIES[kind].names() or find_spec(module) is not None:
        raise RobenchError(f"{name!r} is the name of a plug-in or package that is there; choose another")
    if folder.exists():
        raise RobenchError(f"{folder} exists; choose another --out")
    for path, text in _written(kind, name, module).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    click.echo(f"{folder / module / f'{kind}.py'} is yours to change. Next:")
    install = "pip install" if has_pip() else f"uv pip install --python {sys.executable}"
    click.echo(f"  {install} -e {folder if folder.is_absolute() else f'./{folder}'}\n  robench check plugin {name}")


def has_pip() -> bool:
    """Whether this environment has a pip of its own: one on the path would install elsewhere. Asked of metadata, as
    setuptools takes any look for the module for an installation, and fails to import from then on."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return bool(distribution("pip"))
    except PackageNotFoundError:
        return False


def _written(kind: str, name: str, module: str) -> dict[str, str]:
    """The template's files under their new names, with the one plug-in."""
    file, cls, plugin = _TEMPLATE[kind]
    # In a wheel the template lies in the package, in a clone among the examples.
    package = Path(__file__).parents[1]
    places = package / "template", package.parent / "examples" / "robench-example"
    template = next(place for place in places if place.is_dir())
    project = (template / "pyproject.toml").read_text("utf-8")
    code = (template / "robench_example" / f"{file}.py").read_text("utf-8")
    own = "".join(part.capitalize() for part in name.split("-"))
    other = next(each for each in _TEMPLATE if each != kind)
    project = re.sub(rf'\[project.entry-points."robench.{other}s"\]\n.*?\n\n', "", project, flags=re.DOTALL)
    project = project.replace(plugin, name).replace(f"robench_example.{file}:{cls}", f"{module}.{kind}:{own}")
    project = project.replace("robench-example", name).replace("robench_example", module)
    project = re.sub('description = ".*"', f'description = "The {kind} {name} for robench"', project)
    about = f"The {kind} {name}; `robench check plugin {name}` says whether it keeps the contract."
    return {
        "pyproject.toml": project,
        f"{module}/__init__.py": f'"""{about}"""\n',
        f"{module}/{kind}.py": code.replace(f"class {cls}(", f"class {own}("),
    }
