"""One PNG that shows images side by side with captions, and a part of each magnified below it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # Pillow is in an extra, and this module may be imported without it.
    from PIL import Image, ImageDraw

PAPER, INK, MUTED, FRAME = "#fbfbfa", "#1b1d22", "#666b75", "#ffffff"
PANEL = 480
"""Width of an image, in pixels of the picture."""
MARGIN, GAP, ROW_GAP = 48, 16, 44
TITLE, TEXT = 36, 22
CAPTION_HEIGHT = 36
ZOOM = 3 / 8
"""Width of the magnified part, of the image's; it is half as high as wide."""


@dataclass(frozen=True)
class Panel:
    """An image ``uint8 [h, w, 3]``; its name in ink and what is said about it in grey."""

    image: NDArray[np.uint8]
    name: str
    note: str


@dataclass(frozen=True)
class Row:
    """Panels of one size; ``zoom`` is the centre (y, x) of the magnified part, in 0..1."""

    panels: tuple[Panel, ...]
    zoom: tuple[float, float]


def draw(title: str, subtitle: str, rows: Sequence[Row]) -> bytes:
    """A PNG.  The built-in font has the letters of English and few signs: write words for others."""
    from PIL import Image, ImageDraw, ImageFont

    columns = max(len(row.panels) for row in rows)
    heights = [_height(row) for row in rows]
    top = MARGIN + 2 * TITLE + 2 * TEXT
    size = (2 * MARGIN + columns * PANEL + (columns - 1) * GAP, top + sum(heights) + ROW_GAP * (len(rows) - 1) + MARGIN)
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    # Text stands on baselines ("ls"), so that letters of any height line up.
    pen.text((MARGIN, MARGIN + TITLE * 0.8), title, INK, ImageFont.load_default(TITLE), "ls")
    pen.text((MARGIN, MARGIN + TITLE * 0.8 + TEXT * 1.7), subtitle, MUTED, ImageFont.load_default(TEXT), "ls")
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row.panels):
            _panel(canvas, pen, (MARGIN + column * (PANEL + GAP), top), panel, row.zoom)
        top += height + ROW_GAP
    stream = io.BytesIO()
    canvas.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _height(row: Row) -> int:
    height, width = (int(size) for size in row.panels[0].image.shape[:2])
    return CAPTION_HEIGHT + PANEL * height // width + GAP + PANEL // 2


def _panel(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], panel: Panel, zoom: tuple[float, float]
) -> None:
    from PIL import Image, ImageFont

    left, top = corner
    font = ImageFont.load_default(TEXT)
    baseline = top + CAPTION_HEIGHT - 14
    pen.text((left, baseline), panel.name, INK, font, "ls")
    pen.text((left + PANEL, baseline), panel.note, MUTED, font, "rs")

    image = Image.fromarray(panel.image)
    top += CAPTION_HEIGHT
    height = PANEL * image.height // image.width
    canvas.paste(image.resize((PANEL, height), Image.Resampling.LANCZOS), (left, top))
    box = _box(image.size, zoom)
    scale = PANEL / image.width
    pen.rectangle(
        (left + box[0] * scale, top + box[1] * scale, left + box[2] * scale, top + box[3] * scale),
        outline=FRAME,
        width=2,
    )
    # Pixels are shown as they are: a smooth enlargement would denoise a little by itself.
    part = image.crop(box).resize((PANEL, PANEL // 2), Image.Resampling.NEAREST)
    canvas.paste(part, (left, top + height + GAP))


def _box(size: tuple[int, int], zoom: tuple[float, float]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the magnified part, moved inside the image."""
    width, height = size
    across = max(2, round(width * ZOOM))
    down = across // 2
    left = min(max(0, round(zoom[1] * width) - across // 2), width - across)
    top = min(max(0, round(zoom[0] * height) - down // 2), height - down)
    return left, top, left + across, top + down
