"""Engines with float32 weights that are float16 numbers, which a file holds in half the bytes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zeroskip.core.errors import SaveError
from zeroskip.core.graph import CONV, LINEAR
from zeroskip.model.program import Program
from zeroskip.plan.plan import weights_hash
from zeroskip.run.engine import Variant

SMALLEST = 2.0**-24
"""The smallest positive float16."""


def rounded(variant: Variant) -> Variant:
    """``variant`` with the float32 weights of its layers rounded to float16 numbers; biases stay as they are.

    It computes in float32 as before, and its zeros stay where they are: what would round to zero becomes the smallest
    number instead.  A note of the plan says how far the weights moved.  Their accuracy is the caller's to measure.

    Raises:
        SaveError: a weight is beyond float16's 65504.
    """
    program = variant.program
    tensors, moved, among = dict(program.tensors), 0.0, "no layer"
    for name in sorted({node.args[1].ref for node in program.graph.nodes if node.op in (CONV, LINEAR)}):
        weight = program.tensors[name]
        if weight.dtype != torch.float32:
            continue
        tensors[name] = _half(weight).float()
        far = tensors[name].isinf() & weight.isfinite()
        if far.any():
            raise SaveError(f"{name} holds {float(weight[far][0]):g}, float16 ends at 65504: save it as it is")
        change = float((tensors[name] - weight).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if change > moved:
            moved, among = change, name
    note = f"weights rounded to float16: by at most {moved:.1e} of a layer's norm ({among})"
    plan = replace(variant.plan, weights_hash=weights_hash(tensors), notes=(*variant.plan.notes, note))
    return Variant(Program(program.graph, tensors), plan)


def _half(weight: Tensor) -> Tensor:
    half = weight.half()
    lost = (half == 0) & (weight != 0)
    return torch.where(lost, torch.copysign(torch.tensor(SMALLEST), weight).half(), half)
