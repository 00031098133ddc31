"""Types that msgspec is to decode by, made ready before several threads need them.

msgspec looks into a type when it is first used, and a second thread that uses the type while it does crashes the process
(release 0.22, and its main branch). So every type that is used where threads may be is looked into once, alone: when its module
is imported (:func:`prepare`), or with its decoder (:func:`decoder`).
"""

from __future__ import annotations

import threading
from typing import Any

import msgspec

#: Only one thread looks into types.
_alone = threading.Lock()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def prepare(*kinds: Any) -> None:
    """Look into types that :func:`msgspec.convert` or a ``decode`` is called with."""
    with _alone:
        for kind in kinds:
            msgspec.msgpack.Decoder(kind)


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Return the one decoder of MessagePack for a type of this package."""
    known = _decoders.get(kind)
    if known is None:
        with _alone:
            known = _decoders.setdefault(kind, msgspec.msgpack.Decoder(kind))
    return known
