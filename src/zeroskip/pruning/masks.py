"""Mask selection: which weights stay. True keeps a weight.

Everything here is deterministic: among equal scores the earlier position (row-major) goes first.
"""

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["layer", "global"]


def final_sparsity(pattern: str, sparsity: float | None, scope: str) -> float:
    """The sparsity that `pattern` ends at: `sparsity` itself, or 1 - N/M for "N:M", which ignores it.

    Raises ValueError for an unknown pattern or scope, and for a sparsity outside [0, 1).
    """
    if scope not in ("layer", "global"):
        raise ValueError(f'scope: got {scope!r}, expected "layer" or "global"; choose one of them')
    group = _group(pattern)
    if group is not None:
        if scope == "global":
            raise ValueError(
                f'scope: got "global" with pattern {pattern!r}, expected "layer", since N:M prunes every '
                "group equally; drop scope"
            )
        n, m = group
        return (m - n) / m
    if sparsity is None or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: got {sparsity}, expected a fraction in [0, 1); 0.9 keeps every tenth weight")
    return sparsity


def select(names: Sequence[str], scores: Sequence[Tensor], pattern: str, sparsity: float, scope: str) -> list[Tensor]:
    """Boolean keep-masks for `scores` (one tensor per layer, any float dtype), highest scores kept.

    "unstructured" drops exactly round(sparsity * numel) weights, per layer or, with scope "global", over
    all layers together. "N:M" drops round(sparsity * M) of every M consecutive weights along the
    reduction (dimension 1: input channels, separately for each kernel position, or in_features).

    Raises ValueError for NaN scores and where M does not divide the reduction; `names` are for the message.
    """
    for name, score in zip(names, scores, strict=True):
        if bool(score.isnan().any()):
            raise ValueError(f"layer {name!r}: got NaN weights, expected numbers; go back to a checkpoint without NaN")
    group = _group(pattern)
    if group is not None:
        return [_drop_per_group(name, s, group[1], sparsity) for name, s in zip(names, scores, strict=True)]
    if scope == "layer":
        return [_drop_lowest(s.flatten(), sparsity).view(s.shape) for s in scores]
    keep = _drop_lowest(torch.cat([s.flatten() for s in scores]), sparsity)
    parts = keep.split_with_sizes([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def _group(pattern: str) -> tuple[int, int] | None:
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            f'pattern: got {pattern!r}, expected "unstructured" or "N:M" with 0 < N < M, as in "2:4"; '
            "choose one of them"
        )
    return int(match[1]), int(match[2])


def _drop_lowest(scores: Tensor, sparsity: float) -> Tensor:
    dropped = round(sparsity * scores.numel())
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep[scores.argsort(stable=True)[:dropped]] = False
    return keep


def _drop_per_group(name: str, scores: Tensor, m: int, sparsity: float) -> Tensor:
    reduction = scores.shape[1]
    if reduction % m:
        raise ValueError(
            f"layer {name!r}: got {reduction} input channels (of one group), expected a multiple of {m}; "
            f"leave it alone with skip=[{name!r}]"
        )
    groups = scores.reshape(scores.shape[0], reduction // m, m, -1)
    dropped = groups.argsort(dim=2, stable=True)[:, :, : round(sparsity * m)]
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(2, dropped, False)
    return keep.reshape(scores.shape)
