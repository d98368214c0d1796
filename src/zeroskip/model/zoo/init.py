"""Random initial weights, the same for every network of the zoo."""

from torch import nn


def init_weights(model: nn.Module) -> None:
    """Kaiming-normal convolutions, small normal linear layers, zero biases, in place.

    Source: He et al. 2015, "Delving Deep into Rectifiers" (arXiv 1502.01852).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
