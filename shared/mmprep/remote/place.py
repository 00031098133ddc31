"""Where a program's endpoint leads: a runtime directory of this host, or a door of a service that may be elsewhere."""

from __future__ import annotations

from mmprep.errors import InvalidRequest
from mmprep.remote.curve import RemoteKeys
from mmprep.remote.endpoint import TcpEndpoint, tcp_to_connect
from mmprep.runtime import Endpoint, RuntimeDir, endpoint_text, parse_endpoint


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
    named = "" if endpoint is None else endpoint_text(endpoint)
    if named.startswith("tcp:"):
        place = tcp_to_connect(named)
        keys.check(place)
        return place
    if keys.given:
        raise InvalidRequest("keys are for endpoints of the form tcp://host:port", param="endpoint")
    return parse_endpoint(endpoint)
