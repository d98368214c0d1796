"""The host's side of ``types.cuh``: names of element types, and values of its enumerations."""

from __future__ import annotations

from zeroskip.core.layer import Activation, Precision, ResidualPlace

TYPES: dict[Precision, str] = {"fp32": "float", "tf32": "float", "fp16": "__half", "bf16": "__nv_bfloat16"}
"""Of the elements in memory; kernels that sum in float32 need no TF32."""
ACTIVATIONS: dict[Activation, int] = {"none": 0, "relu": 1, "relu6": 2}
PLACES: dict[ResidualPlace, int] = {"none": 0, "before": 1, "after": 2}
