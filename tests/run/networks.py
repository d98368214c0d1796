"""Networks of the zoo, made small."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zeroskip.model import zoo


def small(name: str, batch: int = 1) -> tuple[nn.Module, Tensor]:
    """A network of the zoo with random weights and few classes, and a small image for it."""
    build = zoo.BUILDERS[name]
    if not name.startswith("vgg"):
        torch.manual_seed(0)
        model = build(depth=5, width=16) if name == "dncnn" else build(num_classes=10)
        return model, torch.rand(2 * batch, 3, 32, 24) if name == "dncnn" else torch.randn(batch, 3, 64, 72)
    with torch.device("meta"):
        model = build(num_classes=10)
        classifier = model.get_submodule("classifier")
        assert isinstance(classifier, nn.Sequential)
        # 120 million weights that say nothing new.
        classifier[0], classifier[3], classifier[6] = nn.Linear(25088, 32), nn.Linear(32, 32), nn.Linear(32, 10)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()
    return model, torch.randn(batch, 3, 32, 32)
