"""The networks that are trained, and what they are measured by."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from zeroskip.pruning import PruneRecord

NETWORKS = ("resnet18", "vgg19_bn")


def counted(record: PruneRecord, model: nn.Module) -> PruneRecord:
    """`record` with the nonzeros that `model` has: rounding to fp16 makes zeros of weights under 3e-8."""
    weights = {layer.name: model.get_submodule(layer.name).get_parameter("weight") for layer in record.layers}
    return PruneRecord(tuple(replace(layer, nnz=int(weights[layer.name].count_nonzero())) for layer in record.layers))


@torch.no_grad()
def macs(model: nn.Module, image: Tensor) -> int:
    """Multiplications with weights that are not zero, of convolutions and linear layers, for one image [1, c, h, w]."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        pixels = output[0, 0].numel()  # 1 after a linear layer
        total += int(module.get_parameter("weight").count_nonzero()) * pixels

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model.eval()(image)
    for hook in hooks:
        hook.remove()
    return total
