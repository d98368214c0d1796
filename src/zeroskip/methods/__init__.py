"""Every method, found by its folder.  Nothing here names one."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from zeroskip.core.method import AnyMethod


@functools.cache
def registry() -> dict[str, AnyMethod]:
    """One instance of each method, by name (the folder's name), in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)
    return {name: importlib.import_module(f"{__name__}.{name}.method").METHOD for name in names}
