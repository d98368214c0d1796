"""A copy of the model in evaluation mode, its pruning masks and parametrizations turned into plain weights."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune


def bake(model: nn.Module) -> nn.Module:
    """Copy ``model``; the original is not touched.

    ``torch.nn.utils.prune`` masks and parametrizations would otherwise be exported as operators that compute
    the weight anew at every call.
    """
    # A freshly masked weight is no leaf of the autograd graph, which deepcopy refuses.
    computed = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in vars(module).values()
        if isinstance(tensor, Tensor) and not tensor.is_leaf
    }
    model = copy.deepcopy(model, computed).eval()
    for module in model.modules():
        for name in [
            hook._tensor_name
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, prune.BasePruningMethod)
        ]:
            prune.remove(module, name)  # type: ignore[no-untyped-call]
        if parametrize.is_parametrized(module):
            _unparametrize(module)
    return model.requires_grad_(False)


def _unparametrize(module: nn.Module) -> None:
    """Make each parametrized tensor a plain parameter.

    Not by ``remove_parametrizations``: it edits the class that torch made for the module, which the copy shares with
    the original.
    """
    values = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
