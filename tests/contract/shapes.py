"""Every kind of geometry, each small."""

from __future__ import annotations

from zeroskip.core.layer import ConvShape

SHAPES = {
    "1x1": ConvShape(1, 5, 7, 9, 6, 1, 1),
    "1x1 one pixel": ConvShape(1, 33, 1, 1, 17, 1, 1),
    "1x1 large batch": ConvShape(5, 12, 3, 17, 7, 1, 1),
    "1x1 in vectors": ConvShape(2, 8, 4, 8, 12, 1, 1),
    "1x1 stride 2": ConvShape(2, 8, 9, 14, 7, 1, 1, (2, 2)),
    "1x1 padded": ConvShape(1, 12, 13, 13, 10, 1, 1, padding=(1, 1)),
    "1x1 padded by 3": ConvShape(1, 4, 2, 3, 5, 1, 1, padding=(3, 2)),
    "3x3": ConvShape(1, 8, 13, 11, 9, 3, 3, padding=(1, 1)),
    "3x3 unpadded": ConvShape(2, 7, 10, 23, 5, 3, 3),
    "3x3 overpadded": ConvShape(1, 3, 5, 4, 4, 3, 3, padding=(4, 3)),
    "3x3 one pixel": ConvShape(1, 9, 1, 1, 8, 3, 3, padding=(1, 1)),
    "3x3 batch 5 of small images": ConvShape(5, 16, 4, 5, 12, 3, 3, padding=(1, 1)),
    "3x3 stride 2": ConvShape(1, 8, 14, 9, 6, 3, 3, (2, 2), (1, 1)),
    "3x3 stride 2x1": ConvShape(2, 5, 9, 12, 6, 3, 3, (2, 1), (1, 1)),
    "3x3 stride 1x2": ConvShape(1, 5, 9, 33, 6, 3, 3, (1, 2), (1, 1)),
    "3x3 stride 3": ConvShape(1, 5, 20, 19, 6, 3, 3, (3, 3)),
    "3x3 stride 4x5": ConvShape(1, 5, 20, 38, 6, 3, 3, (4, 5), (1, 2)),
    "3x3 dilation 2": ConvShape(1, 6, 12, 11, 5, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "3x3 dilation 1x3": ConvShape(2, 6, 8, 16, 5, 3, 3, padding=(1, 3), dilation=(1, 3)),
    "3x3 stride 2 dilation 2": ConvShape(1, 6, 17, 16, 5, 3, 3, (2, 2), (2, 2), (2, 2)),
    "3x3 stride 2 dilation 3": ConvShape(1, 6, 17, 16, 5, 3, 3, (2, 2), (3, 3), (3, 3)),
    "5x5": ConvShape(1, 4, 12, 40, 5, 5, 5, padding=(2, 2)),
    "7x7 stride 2": ConvShape(1, 3, 31, 40, 8, 7, 7, (2, 2), (3, 3)),
    "1x5": ConvShape(1, 6, 9, 14, 7, 1, 5, padding=(0, 2)),
    "5x1": ConvShape(1, 6, 9, 14, 7, 5, 1, padding=(2, 0)),
    "1x7 as large as the image": ConvShape(1, 6, 3, 7, 7, 1, 7),
    "2x2": ConvShape(1, 6, 9, 8, 7, 2, 2),
    "2x2 stride 2": ConvShape(3, 6, 8, 10, 7, 2, 2, (2, 2)),
    "2x2 padded": ConvShape(1, 6, 8, 10, 7, 2, 2, (1, 1), (1, 1)),
    "one column": ConvShape(1, 7, 40, 1, 6, 3, 1, padding=(1, 0)),
    "one row": ConvShape(2, 7, 1, 37, 6, 1, 3, padding=(0, 1)),
    "groups 2": ConvShape(1, 8, 9, 10, 6, 3, 3, padding=(1, 1), groups=2),
    "groups 3 of 1x1": ConvShape(2, 9, 6, 7, 12, 1, 1, groups=3),
    "depthwise": ConvShape(1, 9, 11, 12, 9, 3, 3, padding=(1, 1), groups=9),
    "depthwise stride 2": ConvShape(2, 8, 11, 12, 8, 3, 3, (2, 2), (1, 1), groups=8),
    "depthwise multiplier 2": ConvShape(1, 5, 8, 9, 10, 3, 3, padding=(1, 1), groups=5),
    "one channel": ConvShape(1, 1, 9, 9, 1, 3, 3, padding=(1, 1)),
    "many channels": ConvShape(1, 201, 8, 9, 20, 3, 3, padding=(1, 1)),
    "many channels 1x1": ConvShape(2, 700, 5, 6, 12, 1, 1),
    "empty batch": ConvShape(0, 6, 8, 8, 5, 3, 3, padding=(1, 1)),
}
FEW = ("1x1", "3x3 stride 2", "3x3 batch 5 of small images", "many channels")
