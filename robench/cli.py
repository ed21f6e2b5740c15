"""The command line: parses, calls, prints. Results go to stdout; bars and what is logged to stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules

import click

from robench import commands
from robench.commands._help import Sections
from robench.core.errors import RobenchError, out_of_memory
from robench.core.logs import logged

log = logging.getLogger(__name__)


def main() -> None:
    """The entry point: one line and exit code 2 for what the user can mend."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], program: click.Command | None = None, name: str = "robench") -> int:
    """Runs a command line, of ``program`` or of robench; the exit code."""
    for before, text in zip((name, *arguments), arguments, strict=False):
        # Else it would be taken for absent.
        if not text.strip() or (text.startswith("--") and text.endswith("=")):
            click.echo(f"Error: nothing is said after {text.strip() or before}; say it, or omit it", err=True)
            return 2
    try:
        with logged(_Echo()):
            called = program or cli
            result = called.main(args=list(arguments), prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted; what is finished is kept: run the same command to go on", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (RobenchError, OSError) as error:
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        return 2
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        told = " ".join(str(error).split())[:200]
        click.echo(
            f"Error: the memory does not suffice ({told}); try a smaller --batch-size (of a training: "
            f"--set batch_size=N) or another --device",
            err=True,
        )
        return 2
    return result if isinstance(result, int) else 0


class _Echo(logging.Handler):
    """Lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


#: Commands that have another name now; the old one goes with the next release.
RENAMED = {"doctor": ("check", "model"), "verify": ("check", "result")}


#: What commands are for, as `robench --help` lists them.
SECTIONS = {
    "Begin": ("demo", "list", "init"),
    "Make and judge runs": ("train", "import", "combine", "eval"),
    "Look at results": ("show", "compare", "report"),
    "Whole studies": ("run", "status"),
    "Verify and share": ("check", "publish", "board", "cache"),
}


class _Commands(Sections):
    """Every module of `robench.commands` is a command; only the one that is called is imported."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if now := RENAMED.get(args[0]):
            log.warning(
                f"`robench {args[0]}` is now `robench {' '.join(now)}`; the old name goes with the next release"
            )
            args = [*now, *args[1:]]
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._modules())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = self._modules().get(cmd_name)
        return None if module is None else import_module(f"robench.commands.{module}").command

    @staticmethod
    def _modules() -> dict[str, str]:
        names = [module.name for module in iter_modules(commands.__path__)]
        return {name.rstrip("_"): name for name in names if not name.startswith("_")}


@click.command(
    "robench",
    cls=_Commands,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"]},
    examples=("robench demo", "robench train dverge --dataset digits --n 2 --epochs 2 --name my-dverge"),
)
@click.version_option(package_name="robench")
def cli() -> None:
    """Adversarial robustness of ensembles: train, attack, judge, draw. `robench COMMAND -h` tells more of each."""
