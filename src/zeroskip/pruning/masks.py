"""Mask selection: which weights stay. True keeps a weight.

Everything here is deterministic: among equal scores the earlier position (row-major) goes first.
"""

import math
import re
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Scope = Literal["layer", "global", "erk"]
FILTERS = "filters"


def final_sparsity(pattern: str, sparsity: float | None, scope: str) -> float:
    """The sparsity that `pattern` ends at: `sparsity` itself, or 1 - N/M for "N:M", which ignores it.

    Raises ValueError for an unknown pattern or scope, and for a sparsity outside [0, 1).
    """
    if scope not in get_args(Scope):
        raise ValueError(f'scope: got {scope!r}, expected "layer", "global" or "erk"; choose one of them')
    group = _group(pattern)
    if group is not None:
        if scope != "layer":
            raise ValueError(
                f'scope: got "{scope}" with pattern {pattern!r}, expected "layer", since N:M prunes every '
                "group equally; drop scope"
            )
        n, m = group
        return (m - n) / m
    if sparsity is None or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: got {sparsity}, expected a fraction in [0, 1); 0.9 keeps every tenth weight")
    if pattern == FILTERS and scope == "erk":
        raise ValueError(
            f'scope: got "erk" with pattern {pattern!r}, expected "layer" or "global"; erk deals single weights'
        )
    return sparsity


def select(names: Sequence[str], scores: Sequence[Tensor], pattern: str, sparsity: float, scope: str) -> list[Tensor]:
    """Boolean keep-masks for `scores` (one tensor per layer, any float dtype), highest scores kept.

    "unstructured" drops exactly round(sparsity * numel) weights: of every layer, of all layers together
    (scope "global"), or of every layer at the sparsity that `erk_sparsities` deals it (scope "erk").
    "N:M" drops round(sparsity * M) of every M consecutive weights along the reduction (dimension 1:
    input channels, separately for each kernel position, or in_features).

    Raises ValueError for NaN scores and where M does not divide the reduction; `names` are for the message.
    """
    for name, score in zip(names, scores, strict=True):
        if bool(score.isnan().any()):
            raise ValueError(f"layer {name!r}: got NaN weights, expected numbers; go back to a checkpoint without NaN")
    group = _group(pattern)
    if group is not None:
        return [_drop_per_group(name, s, group[1], sparsity) for name, s in zip(names, scores, strict=True)]
    if scope != "global":
        shapes = [s.shape for s in scores]
        dealt = erk_sparsities(shapes, sparsity) if scope == "erk" else [sparsity] * len(shapes)
        return [_drop_lowest(s.flatten(), part).view(s.shape) for s, part in zip(scores, dealt, strict=True)]
    keep = _drop_lowest(torch.cat([s.flatten() for s in scores]), sparsity)
    parts = keep.split_with_sizes([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def erk_sparsities(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """The sparsity of each layer, by its weight's shape, that makes `sparsity` of all weights together.

    A layer's density is proportional to sum(shape) / prod(shape): output channels, input channels (of one
    group) and both sides of the kernel. So the big layers carry the zeros and the small ones stay dense.
    What a layer cannot take, being dense already, is shared among the others. Higher sparsities never
    make a layer denser. The counts are rounded for each layer, so the total is off by half a weight each at most.

    Source: Evci et al. 2020, "Rigging the Lottery" (arXiv 1911.11134), section 3, "Erdos-Renyi-Kernel".
    """
    numel = [math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        # `rest` layers share what the dense ones leave: scale * sum(shape) weights each.
        rest = [i for i in range(len(shapes)) if i not in dense]
        budget = (1 - sparsity) * sum(numel) - sum(numel[i] for i in dense)
        scale = budget / sum(sum(shapes[i]) for i in rest) if rest else 0.0
        full = {i for i in rest if scale * sum(shapes[i]) >= numel[i]}
        if not full:
            break
        dense |= full
    return [0.0 if i in dense else 1 - scale * sum(shapes[i]) / numel[i] for i in range(len(shapes))]


def _group(pattern: str) -> tuple[int, int] | None:
    if pattern in ("unstructured", FILTERS):
        return None
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            f'pattern: got {pattern!r}, expected "unstructured", "filters" or "N:M" with 0 < N < M, as in "2:4"; '
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
    groups = scores.reshape(scores.shape[0], reduction // m, m, math.prod(scores.shape[2:]))
    dropped = groups.argsort(dim=2, stable=True)[:, :, : round(sparsity * m)]
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(2, dropped, False)
    return keep.reshape(scores.shape)
