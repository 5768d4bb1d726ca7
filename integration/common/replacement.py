"""An engine's function, replaced wherever modules hold it by name."""

from __future__ import annotations

import sys
from types import ModuleType

__all__ = ["replace_function"]


def replace_function(old: object, new: object) -> None:
    """Put `new` in place of `old` in every loaded module that holds it, under any name.

    Modules that are imported later get `new` from the function's own module.
    """
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            # Not `getattr`: it makes lazy modules import things.
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)
