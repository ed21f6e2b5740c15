"""robench: the adversarial robustness of ensembles, measured so that the number can be checked.

From Python: `evaluate`, the threats `Whitebox`, `Blackbox` and `Transfer`, `load_data`, `Ensemble`. They are imported
on first use, so that `robench --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robench.api import evaluate
    from robench.core.data import load as load_data
    from robench.core.ensemble import Ensemble
    from robench.core.errors import DoubtWarning, RobenchError
    from robench.evaluation.evaluated import EvaluatedModel
    from robench.evaluation.outcomes import Outcomes
    from robench.evaluation.threats import Blackbox, Transfer, Whitebox

__all__ = [
    "Blackbox",
    "DoubtWarning",
    "Ensemble",
    "EvaluatedModel",
    "Outcomes",
    "RobenchError",
    "Transfer",
    "Whitebox",
    "evaluate",
    "load_data",
]

_HOME = {
    "Blackbox": "robench.evaluation.threats",
    "DoubtWarning": "robench.core.errors",
    "Ensemble": "robench.core.ensemble",
    "Outcomes": "robench.evaluation.outcomes",
    "RobenchError": "robench.core.errors",
    "EvaluatedModel": "robench.evaluation.evaluated",
    "Transfer": "robench.evaluation.threats",
    "Whitebox": "robench.evaluation.threats",
    "evaluate": "robench.api",
}
#: What was called otherwise, for scripts that use the old name.
_RENAMED = {"Subject": "EvaluatedModel"}


def __getattr__(name: str) -> Any:
    if name == "load_data":
        return import_module("robench.core.data").load
    name = _RENAMED.get(name, name)
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'robench' has no attribute {name!r}")
