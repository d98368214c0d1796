"""HTML as nested calls.  Only ``Html`` goes in as it is, every other text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


VOID = Html("")


def tag(name: str, *children: str, **attributes: str) -> Html:
    """``<name attribute="...">children</name>``; ``class_`` is written ``class``, other underscores are hyphens."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def empty(name: str, **attributes: str) -> Html:
    """An element that has no end tag: ``img``, ``rect``."""
    return Html(tag(name, **attributes).removesuffix(f"</{name}>").removesuffix(">") + "/>")


def join(parts: Iterable[str]) -> Html:
    """The parts, one after another."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))
