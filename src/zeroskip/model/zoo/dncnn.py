"""DnCNN, a residual denoiser."""

from torch import Tensor, nn

from .init import init_weights


class DnCNN(nn.Module):
    """Estimates the noise in an image with a plain stack of 3x3 convolutions and subtracts it."""

    def __init__(self, channels: int, depth: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        layers.append(nn.Conv2d(width, channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        noise: Tensor = self.layers(x)
        return x - noise


def dncnn(channels: int = 3, depth: int = 17, width: int = 64) -> nn.Module:
    """Denoiser: float image [n, channels, h, w] in 0..1 with noise, to the same shape without.

    `depth` counts convolutions; `width` is the channel count between them.
    Raises ValueError where `depth` is under 2.

    Source: Zhang et al. 2017, "Beyond a Gaussian Denoiser" (arXiv 1608.03981).
    """
    if depth < 2:
        raise ValueError(f"depth: got {depth}, expected at least 2 (first and last convolution); raise depth")
    model = DnCNN(channels, depth, width)
    init_weights(model)
    return model
