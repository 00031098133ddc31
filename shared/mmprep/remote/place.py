"""Where a program's endpoint leads: a runtime directory of this host, or a door of a service that may be elsewhere."""

from __future__ import annotations

from typing import TypeGuard

from mmprep.errors import InvalidRequest
from mmprep.remote.curve import RemoteKeys
from mmprep.remote.endpoint import TcpEndpoint, tcp_to_connect
from mmprep.runtime import Endpoint, RuntimeDir, endpoint_text, parse_endpoint


def is_remote(endpoint: Endpoint | None) -> TypeGuard[Endpoint]:
    """Whether an endpoint has the form of one that may be on another host."""
    return endpoint is not None and endpoint_text(endpoint).startswith("tcp:")


def place_of(endpoint: Endpoint | None, keys: RemoteKeys) -> RuntimeDir | TcpEndpoint:
    """Return the place.

    Parameters
    ----------
    endpoint:
        As :func:`mmprep.runtime.parse_endpoint` takes it, or ``tcp://host:port``.
    keys:
        For the latter.

    Raises
    ------
    mmprep.errors.InvalidRequest
        It is neither, or the keys do not go with it.
    mmprep.errors.ServiceUnavailable
        No service of this user runs in the directory.
    """
    if is_remote(endpoint):
        place = tcp_to_connect(endpoint_text(endpoint))
        keys.check(place)
        return place
    if keys.given:
        raise InvalidRequest("keys are for endpoints of the form tcp://host:port", param="endpoint")
    return parse_endpoint(endpoint)
