"""mmprep: multimodal preprocessing for inference engines.

Import from here what a program that talks to the service needs: the clients, the backend, the errors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmprep.errors import (
    AuthenticationError,
    Busy,
    Conflict,
    DeadlineExceeded,
    DecodeError,
    FetchError,
    Forbidden,
    InternalError,
    InvalidRequest,
    LeaseLost,
    MediaError,
    MmprepError,
    NotFound,
    ProtocolError,
    ServiceUnavailable,
    StaleAddress,
    StaleDelivery,
    TooLarge,
    UnsupportedMedia,
)

if TYPE_CHECKING:
    from mmprep.backend import AsyncBackend, Backend
    from mmprep.client import AsyncClient, Client

__version__ = "0.1.0"

_LAZY = {
    "Client": "mmprep.client",
    "AsyncClient": "mmprep.client",
    "AsyncBackend": "mmprep.backend",
    "Backend": "mmprep.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "AsyncBackend",
    "AsyncClient",
    "AuthenticationError",
    "Backend",
    "Busy",
    "Client",
    "Conflict",
    "DeadlineExceeded",
    "DecodeError",
    "FetchError",
    "Forbidden",
    "InternalError",
    "InvalidRequest",
    "LeaseLost",
    "MediaError",
    "MmprepError",
    "NotFound",
    "ProtocolError",
    "ServiceUnavailable",
    "StaleAddress",
    "StaleDelivery",
    "TooLarge",
    "UnsupportedMedia",
    "__version__",
]
