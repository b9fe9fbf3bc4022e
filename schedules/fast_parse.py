"""Makes TVMScript parse about fifteen times faster, by replacing how `inspect` finds a frame's module.

TVM's parser calls `inspect.stack()` for every function; that asks `inspect.getmodule` for each frame, which walks
all of sys.modules. A frame knows its module's name, so the answer is one look-up.
"""

from __future__ import annotations

import inspect
import sys

_slow_getmodule = inspect.getmodule


def _getmodule(found: object, _filename: str | None = None) -> object:
    if inspect.isframe(found):
        return sys.modules.get(found.f_globals.get("__name__", ""))
    return _slow_getmodule(found, _filename)


inspect.getmodule = _getmodule  # type: ignore[assignment]
