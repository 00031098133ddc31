"""The HTTP port that several processes share.

Each frontend binds a socket of its own with SO_REUSEPORT, and the kernel deals the connections out. The supervisor keeps
the port taken, and chooses it where 0 was asked for, with a socket that is bound and never listens; the kernel gives such
a one no connections.
"""

from __future__ import annotations

import socket

from mmprep.errors import StartupError


def reserve_port(host: str, port: int) -> socket.socket:
    """Return a socket bound to ``host`` and ``port`` that others can bind beside, and that does not listen.

    Raises
    ------
    mmprep.errors.StartupError
        The host is no address of this machine, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError):
        raise StartupError(f"--host {host}: neither an IP address nor a name of this machine") from None
    try:
        # REUSEADDR too: connections of a previous run that still time out would hold the port.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise StartupError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from None
    bound.setblocking(False)
    return bound


def claim_port(host: str, port: int) -> socket.socket:
    """Return :func:`reserve_port`'s socket, after making sure that no other service listens there.

    SO_REUSEPORT alone would let a second service of the same user share the port, and take half of the requests.

    Raises
    ------
    mmprep.errors.StartupError
        As :func:`reserve_port`, or another process listens there.
    """
    reserved = reserve_port(host, 0)
    probe = socket.socket(reserved.family, reserved.type)
    reserved.close()
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartupError(
                f"--host {host} --port {port}: cannot listen there ({error.strerror}); "
                "stop what listens there, or give another --port"
            ) from None
    return reserve_port(host, port)
