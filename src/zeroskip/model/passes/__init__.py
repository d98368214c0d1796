"""Rewrites of the graph, each a function ``Program -> Program`` in a file of its own, in the order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from zeroskip.model.passes.fold_batch_norm import fold_batch_norm
from zeroskip.model.passes.fuse_activation import fuse_activation
from zeroskip.model.passes.fuse_residual import fuse_residual
from zeroskip.model.passes.name_layers import name_layers
from zeroskip.model.passes.remove_dead import remove_dead
from zeroskip.model.program import Program

Pass = Callable[[Program], Program]

PASSES: tuple[Pass, ...] = (
    name_layers,
    remove_dead,
    fold_batch_norm,
    fuse_activation,
    fuse_residual,
    fuse_activation,
    remove_dead,
)
"""Activations are looked for twice: behind a convolution, and behind the sum that has been fused into it."""


def steps(program: Program) -> Iterator[tuple[str, Program]]:
    """The name of each pass with the program after it, for printing what it did."""
    for rewrite in PASSES:
        program = rewrite(program)
        yield rewrite.__name__, program


def simplify(program: Program) -> Program:
    """``program`` after every pass."""
    for rewrite in PASSES:
        program = rewrite(program)
    return program
