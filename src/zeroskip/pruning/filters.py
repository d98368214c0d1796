"""Removing whole filters, through the library torch-pruning."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.core.errors import Unsupported

from .config import PruneConfig
from .dependencies import checked_example, dependency_graph, torch_pruning, traceable
from .layers import Layer, choose_layers
from .record import LayerRecord, PruneRecord

TOGETHER = 8
"""Channels that matrix and vector units take at once."""


def remove_filters(model: nn.Module, example: Tensor | None, config: PruneConfig) -> PruneRecord:
    """Remove `config.sparsity` of the filters of `model`'s layers, in place: its tensors get smaller.

    The filters with the smallest L2 norm go, of each layer or, with scope "global", by one threshold for all. With
    scope "layer" a layer of n filters keeps (1 - sparsity) * n of them: more than 8 to the nearest multiple of 8, since
    tensor cores and vector units do not gain from what lies between; fewer rounded down, but one at least.
    Where sums tie the filters of several layers together, their norms are averaged and they go together, unless one
    of the layers is to be left alone. Which layers are tied, and what reads a channel that goes, is torch-pruning's
    knowledge. A layer that keeps its filters may still lose input channels, as the output layer does.

    The record counts a layer's weights before (`numel`) and the nonzeros left (`nnz`); masks of zeros that are there
    already stay zero. Parameters are replaced: make the optimizer anew.

    Raises:
        ValueError: no example, or `skip` and `only` as for `prune`, or NaN weights, or a layer would lose all filters
            (by the threshold for all, or where filters go in groups).
        Unsupported: torch-pruning is missing or cannot trace the network, or the smaller network does not run.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710), for removal by norm; Fang et
    al. 2023, "DepGraph" (arXiv 2301.12900), for layers that are tied.
    """
    example = checked_example(example, 'pattern "filters"')
    layers = choose_layers(model, config.skip, config.only, filters=True)
    for layer in layers:
        if bool(layer.weight.isnan().any()):
            raise ValueError(f"layer {layer.name!r}: got NaN weights, expected numbers; go back to an older checkpoint")
    library = torch_pruning()
    before = {layer.name: layer.weight.numel() for layer in layers}
    dependency_graph(library, traceable(model), example)  # raises what there is to say about the network
    trial = copy.deepcopy(model)
    try:
        _remove(trial, example, config, layers)
        with torch.no_grad():
            trial.eval()(example)
    except _NoFilterLeft as error:
        raise ValueError(
            f"sparsity: got {config.sparsity} with scope {config.scope!r}, which leaves no filter in {error}, expected "
            "one at least; lower it or leave these layers alone with skip=[...]"
        ) from error
    except Exception as error:  # of the network or of the library: any type
        raise Unsupported(
            f"torch-pruning removed filters of {type(model).__name__}, which then failed on the example: "
            f"{type(error).__name__}: {error}; leave the layers it names alone with skip=[...]"
        ) from error
    _remove(model, example, config, layers)
    return PruneRecord(
        tuple(
            LayerRecord(
                name=layer.name,
                numel=before[layer.name],
                nnz=int(layer.weight.count_nonzero()),
                pattern="dense" if layer.reason else config.pattern,
                reason=layer.reason,
            )
            for layer in layers
        )
    )


class _NoFilterLeft(Exception):
    """Names the layers."""


def _remove(model: nn.Module, example: Tensor, config: PruneConfig, layers: list[Layer]) -> None:
    library = torch_pruning()
    training = {module: module.training for module in model.modules()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.eval().requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = library.pruner.BasePruner(
                model,
                example,
                importance=library.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=config.sparsity,
                pruning_ratio_dict=None if config.scope == "global" else _ratios(config, model, layers),
                global_pruning=config.scope == "global",
                root_module_types=[nn.Conv2d, nn.Linear],  # the library would take transposed convolutions, too
                ignored_layers=[model.get_submodule(layer.name) for layer in layers if layer.reason],
            )
            pruner.DG.check_pruning_group = partial(_check_group, model, pruner.DG, pruner.DG.check_pruning_group)
            pruner.step()
        parted = [name for name, _ in model.named_parameters() if name not in gradients]
        if parted:
            raise RuntimeError(f"{parted[0]} would no longer be the tensor that it shares with another layer")
    finally:
        for module, mode in training.items():
            module.training = mode
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(gradients.get(name, True))
            parameter.grad = None


def _ratios(config: PruneConfig, model: nn.Module, layers: list[Layer]) -> dict[nn.Module, float]:
    """The fraction of each layer's filters that goes.

    The library keeps int(n * (1 - ratio)) of n; half a filter more than is meant makes that immune to rounding.
    """
    assert config.sparsity is not None
    ratios = {}
    for layer in layers:
        filters = layer.weight.shape[0]
        if layer.reason is None:
            ratios[model.get_submodule(layer.name)] = max(0.0, 1 - (_kept(filters, config.sparsity) + 0.5) / filters)
    return ratios


def _kept(filters: int, sparsity: float) -> int:
    """How many of a layer's filters stay."""
    left = max(1, int(filters * (1 - sparsity) + 1e-6))
    return left if left <= TOGETHER else min(filters, TOGETHER * round(left / TOGETHER))


def _check_group(model: nn.Module, graph: Any, check: Callable[[Any], bool], group: Any) -> bool:
    """The library's own check, which says no where nothing would be left; it then leaves everything, silently."""
    if not check(group):
        losing = {item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)}
        names = [name for name, module in model.named_modules() if module in losing]
        raise _NoFilterLeft(
            ", ".join(repr(name) for name in names if isinstance(model.get_submodule(name), nn.Conv2d | nn.Linear))
        )
    return True
