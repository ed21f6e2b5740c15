"""One schema of a threat: what is declared in it is an option, a key of a study and a field of the threat."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from robench.cli import run
from robench.commands.eval import command
from robench.evaluation import schema
from robench.evaluation.threats import THREATS
from robench.studies.study import Threats, parse
from tests.test_imports import loaded

ROOT = Path(__file__).parents[2]

#: Adds one line to `robench.evaluation.schema`, before anything else of ours is imported.
NEW = """
import importlib.util, sys
found = importlib.util.find_spec("robench.evaluation.schema")
before = "    restarts: Count | None = Field("
text = open(found.origin, encoding="utf-8").read()
assert text.count(before) == 1
text = text.replace(before, '    patience: Count = Field(7, description="Steps without gain.")\\n' + before)
made = sys.modules[found.name] = importlib.util.module_from_spec(found)
exec(compile(text, found.origin, "exec"), made.__dict__)
"""

USED = """
from click.testing import CliRunner
from robench.commands.eval import command
from robench.core.errors import RobenchError
from robench.evaluation.threats import THREATS, Blackbox, Whitebox
from robench.studies.plan import expand
from robench.studies.study import find, parse

told = CliRunner().invoke(command, ["--help"]).output
heading = told.index("Attacks (--threat whitebox, blackbox, transfer, convergence, queries):")
assert heading < told.index("--patience INTEGER") < told.index("Surrogates (--threat"), told
assert "Steps without gain.  [default: 7]" in told, told

assert Whitebox(eps=(0.1,)).patience == 7 and Whitebox(eps=(0.1,), patience=2).patience == 2
assert all("patience" in kind.model_fields for kind in THREATS.values())
try:
    Whitebox(eps=(0.1,), patience=0)
except RobenchError as error:
    assert str(error).endswith("got 0; Steps without gain."), error
else:
    raise AssertionError("the range is not checked")

def options(*settings):
    plan = expand("demo", parse(*find("demo"), settings))
    return [step.options.get("patience") for step in plan.steps.values() if step.threat == "whitebox"]

assert set(options()) == {None} and set(options("threats.whitebox.patience=3")) == {3}
"""


def test_a_new_field_is_one_line_in_one_file() -> None:
    done = subprocess.run([sys.executable, "-c", NEW + USED], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threat", schema.NAMES)
def test_every_threat_takes_what_the_schema_says(threat: str) -> None:
    (table,) = _tables(threat)
    asked = schema.Diversity if threat == "diversity" else schema.Asked
    assert set(asked.model_fields) <= set(table.model_fields)
    if threat != "diversity":
        assert set(schema.Effort.model_fields) <= set(THREATS[threat].model_fields)
    if threat == "blackbox":
        assert set(schema.Relation.model_fields) <= set(THREATS[threat].model_fields)
        assert {*schema.Surrogates.model_fields, *schema.SurrogateDefense.model_fields} <= set(table.model_fields)


def _tables(threat: str) -> list[type[schema.Validated]]:
    """The class of ``[threats.x]``."""
    study = parse("x", f'title="x"\ndataset="digits"\ndefenses=["baseline"]\nsizes=[2]\n[threats.{threat}]\n')
    assert isinstance(study.threats, Threats)
    return [type(table) for table in study.threats.given().values() if isinstance(table, schema.Validated)]


def test_the_schema_s_fields_are_declared_nowhere_else() -> None:
    names = {name for kind in (schema.Asked, schema.HoldOuts) for name in kind.model_fields}
    text = (ROOT / "robench/commands/eval.py").read_text(encoding="utf-8")
    assert not [name for name in names if f'"--{name.replace("_", "-")}"' in text]


def test_the_schema_imports_no_torch() -> None:
    assert not loaded("import robench.evaluation.schema, robench.commands.eval") & {"torch", "numpy", "pandas"}


def test_every_option_of_eval_is_explained_and_in_one_section() -> None:
    told = click.Context(command, info_name="robench eval")
    text = command.get_help(told)
    options = [each for each in command.params if isinstance(each, click.Option)]
    assert len(options) > 25
    for option in options:
        assert text.count(f"  {option.opts[0]} ") == 1, option.opts[0]
    for name in ("--surrogates", "--allow-related", "--no-train", "--yes"):
        assert text.index("Surrogates (--threat blackbox)") < text.index(f"  {name} ") < text.index("\nImages:")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--threat whitebox --restarts 0", "'restarts' of --threat whitebox: .* got 0; Random starts"),
        ("--threat whitebox --steps 0", "'steps' of --threat whitebox: .* got 0; Gradient steps"),
        ("--threat whitebox --samples 0", "'samples' of --threat whitebox: .* got 0"),
        ("--threat whitebox --attacks ,", "'attacks' of --threat whitebox: .*at least 1 item"),
        ("--threat whitebox --losses ce,ce", "'losses' of --threat whitebox: values should differ"),
        ("--threat blackbox --surrogates 0", "'surrogates' of --threat blackbox: .* got 0"),
        ("--threat blackbox --surrogates 3,-1", "'surrogates' of --threat blackbox: .* got -1"),
        ("--threat blackbox --surrogates ,", "'surrogates' of --threat blackbox: .*at least 1 item"),
        ("--threat whitebox --surrogates 3", "--surrogates has no effect under --threat whitebox"),
        ("--threat transfer --allow-related", "--allow-related has no effect under --threat transfer"),
        ("--threat diversity --restarts 3", "--restarts has no effect under --threat diversity"),
        ("--threat diversity --strict", "--strict has no effect under --threat diversity"),
    ],
)
def test_wrong_options_give_one_line(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(told, line), line


def test_a_study_names_no_runs_as_surrogates() -> None:
    text = 'title="x"\ndataset="digits"\ndefenses=["baseline"]\nsizes=[2]\n[threats.blackbox]\nsurrogates=["mine"]'
    with pytest.raises(ValueError, match=r"threats\.blackbox\.surrogates: should be sizes, .* not mine"):
        parse("x", text)


def test_a_wrong_option_is_answered_before_torch_is_imported() -> None:
    """Within half a second, not three."""
    code = "from robench.cli import run\nassert run(['eval', '--threat', 'whitebox', '--restarts', '0']) == 2"
    assert not loaded(code) & {"torch", "pandas"}
