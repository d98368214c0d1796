"""Pruned convolutional networks that actually run faster.

import zeroskip
zeroskip.prune(model, sparsity=0.9)
engine = zeroskip.compile(model, example)
print(engine.plan)
y = engine(x)
engine.save("model.zsk"); engine = zeroskip.load("model.zsk")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zeroskip._version import __version__

if TYPE_CHECKING:
    from zeroskip.plan.plan import Plan as Plan
    from zeroskip.pruning import prune as prune
    from zeroskip.run.compile import compile as compile
    from zeroskip.run.engine import Engine as Engine
    from zeroskip.run.file import load as load

# Found on first use, so that `zeroskip --help` does not wait for torch.
_HOMES = {
    "Engine": "zeroskip.run.engine",
    "Plan": "zeroskip.plan.plan",
    "compile": "zeroskip.run.compile",
    "load": "zeroskip.run.file",
    "prune": "zeroskip.pruning",
}

__all__ = ["Engine", "Plan", "__version__", "compile", "load", "prune"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zeroskip' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
