"""Pruned convolutional networks that actually run faster.

import zeroskip
zeroskip.prune(model, sparsity=0.9)
engine = zeroskip.compile(model, example)
print(engine.plan)
y = engine(x)
engine.save("model.zsk"); engine = zeroskip.load("model.zsk")
"""

from zeroskip._version import __version__
from zeroskip.plan.plan import Plan
from zeroskip.pruning import prune
from zeroskip.run.compile import compile
from zeroskip.run.engine import Engine
from zeroskip.run.file import load

__all__ = ["Engine", "Plan", "__version__", "compile", "load", "prune"]
