"""``tcp://`` endpoints, and what tells whether two processes are on one host."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from pathlib import Path
from typing import NamedTuple

from mmprep.errors import InvalidRequest, StartupError

_FORM = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})\Z", re.ASCII)
_LARGEST_PORT = 65535
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class TcpEndpoint(NamedTuple):
    """A host and a port; an IPv6 address stands without its brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if self.is_ipv6 else f"tcp://{self.host}:{self.port}"

    @property
    def is_ipv6(self) -> bool:
        """Whether the host is an IPv6 address."""
        return ":" in self.host

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this host can be at the other end; a name, but ``localhost``, never says so."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_tcp(text: str) -> TcpEndpoint | None:
    """Return the endpoint in ``tcp://host:port``, ``None`` where the text has another form."""
    found = _FORM.fullmatch(text)
    if found is None or int(found["port"]) > _LARGEST_PORT:
        return None
    host = found["host"].strip("[]")
    if found["host"].startswith("["):
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return None
    return TcpEndpoint(host, int(found["port"]))


def tcp_to_connect(text: str) -> TcpEndpoint:
    """Return the endpoint of a service; raises InvalidRequest."""
    endpoint = parse_tcp(text)
    if endpoint is None or endpoint.port == 0:
        raise InvalidRequest("the endpoint must be tcp:// with a host and a port, as tcp://host:7790", param="endpoint")
    return endpoint


def tcp_to_bind(text: str, option: str) -> TcpEndpoint:
    """Return an endpoint of this machine to listen on; raises StartupError.

    The host is an address, no name: what a name means may change, and with it who can connect.
    """
    endpoint = parse_tcp(text)
    try:
        if endpoint is not None:
            ipaddress.ip_address(endpoint.host)
            return endpoint
    except ValueError:
        pass
    raise StartupError(
        f"{option}: {text!r} is not tcp:// with an IP address of this machine and a port, as tcp://10.0.0.5:7790"
    )


def host_id() -> bytes:
    """Return 16 bytes that stand for this boot of this machine; containers on one machine have the same, or none where hidden."""
    try:
        boot = _BOOT_ID.read_bytes()
    except OSError:
        return b""
    return hashlib.blake2b(boot, digest_size=16, person=b"mmprep host").digest()
