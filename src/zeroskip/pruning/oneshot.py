"""Pruning in one shot."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import PruneConfig
from .layers import choose_layers
from .masks import FILTERS, Scope, select
from .record import PruneRecord, record_layers


def prune(
    model: nn.Module,
    sparsity: float | PruneConfig | None = 0.9,
    *,
    pattern: str = "unstructured",
    scope: Scope = "layer",
    skip: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    permute: bool = False,
    example: Tensor | None = None,
) -> PruneRecord:
    """Set the smallest weights of `model`'s Conv2d and Linear layers to zero, or remove filters, in place.

    A trained network loses accuracy this way, soon all of it: to keep it, prune while training with
    `GradualPruner` or `RewindPruner`, or train the smaller network after removing filters.

    Args:
        model: any network; its weights may have any float dtype.
        sparsity: fraction of the weights to zero, in [0, 1); exactly round(sparsity * numel) of them.
            Weights that are zero already count, and none is ever un-zeroed. Ignored for "N:M". With
            "filters", the fraction of the filters. A `PruneConfig` stands for all arguments but `example`.
        pattern: "unstructured"; or "N:M" such as "2:4": of every M consecutive weights along the
            reduction (input channels at each kernel position, or in_features), the N largest stay; or
            "filters": whole filters go, together with the channels that read them, so that the layers get
            smaller (see `zeroskip.pruning.filters`; needs the extra `zeroskip[prune]`). An optimizer of the
            network has to be made anew after that.
        scope: "layer" prunes every layer to `sparsity`; "global" all of them together by one threshold;
            "erk" all of them together, a layer's density being proportional to sum / product of its weight's
            dimensions (see `erk_sparsities`).
        skip: fnmatch patterns of module names to leave alone, besides the defaults: the first
            convolution, depthwise convolutions, and the output layer (the last Linear or, in a network
            without any, the last convolution). With "filters" the output layer is the only default.
        only: fnmatch patterns of module names to prune; it replaces those defaults.
        permute: for "N:M": first reorder channels, of a layer and of all that read it, so that groups of M
            neighbours lose less magnitude; the network computes the same (see `zeroskip.pruning.permute`;
            needs the extra `zeroskip[prune]`).
        example: an input of the network, needed by `permute` and "filters" only, which trace it.

    Returns:
        What was pruned and what was left alone, and why.

    Raises:
        ValueError: arguments out of range, a pattern of names that matches nothing, NaN weights, input
            channels that M does not divide, no layer to prune, weights that are masked by
            torch.nn.utils.prune or parametrized, or an example that is missing. The model is then unchanged.
        Unsupported: the network cannot be traced, or torch-pruning is not installed. The model is then unchanged.

    Source: Han et al. 2015, "Learning both Weights and Connections" (arXiv 1506.02626), for magnitude;
    Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378), for N:M.
    """
    config = PruneConfig.of(sparsity, pattern, scope, skip, only, permute)
    config.need_magnitude("pruning in one shot")
    if config.pattern == FILTERS:
        from .filters import remove_filters

        return remove_filters(model, example, config)
    layers = choose_layers(model, config.skip, config.only)
    pruned = [layer for layer in layers if layer.reason is None]

    def masks() -> list[Tensor]:
        scores = [layer.weight.abs() for layer in pruned]
        return select([layer.name for layer in pruned], scores, config.pattern, config.final_sparsity, config.scope)

    with torch.no_grad():
        found = masks()  # raises before any channel has moved
        if config.permute:
            from .permute import permute_channels

            permute_channels(model, example, config)
            found = masks()
        for layer, mask in zip(pruned, found, strict=True):
            layer.weight.masked_fill_(~mask, 0)
    return record_layers(layers, config.pattern)
