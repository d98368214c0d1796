"""Pruning in one shot."""

from collections.abc import Sequence

import torch
from torch import nn

from .layers import choose_layers
from .masks import Scope, final_sparsity, select
from .record import PruneRecord, record_layers


def prune(
    model: nn.Module,
    sparsity: float | None = 0.9,
    *,
    pattern: str = "unstructured",
    scope: Scope = "layer",
    skip: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
) -> PruneRecord:
    """Set the smallest weights of `model`'s Conv2d and Linear layers to zero, in place.

    A trained network loses accuracy this way, soon all of it: to keep it, prune while training with
    `GradualPruner`.

    Args:
        model: any network; its weights may have any float dtype.
        sparsity: fraction of the weights to zero, in [0, 1); exactly round(sparsity * numel) of them.
            Weights that are zero already count, and none is ever un-zeroed. Ignored for "N:M".
        pattern: "unstructured", or "N:M" such as "2:4": of every M consecutive weights along the
            reduction (input channels at each kernel position, or in_features), the N largest stay.
        scope: "layer" prunes every layer to `sparsity`; "global" all of them together by one threshold.
        skip: fnmatch patterns of module names to leave alone, besides the defaults: the first
            convolution, depthwise convolutions, and the output layer (the last Linear or, in a network
            without any, the last convolution).
        only: fnmatch patterns of module names to prune; it replaces those defaults.

    Returns:
        What was pruned and what was left alone, and why.

    Raises:
        ValueError: arguments out of range, a pattern of names that matches nothing, NaN weights, input
            channels that M does not divide, no layer to prune, or weights that are masked by
            torch.nn.utils.prune or parametrized. The model is then unchanged.

    Source: Han et al. 2015, "Learning both Weights and Connections" (arXiv 1506.02626), for magnitude;
    Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378), for N:M.
    """
    target = final_sparsity(pattern, sparsity, scope)
    layers = choose_layers(model, skip, only)
    pruned = [layer for layer in layers if layer.reason is None]
    with torch.no_grad():
        scores = [layer.weight.abs() for layer in pruned]
        masks = select([layer.name for layer in pruned], scores, pattern, target, scope)
        for layer, mask in zip(pruned, masks, strict=True):
            layer.weight.masked_fill_(~mask, 0)
    return record_layers(layers, pattern)
