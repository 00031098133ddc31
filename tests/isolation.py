"""A network of its own for a command, in which every address is this machine's: nothing can leave, and nothing is missed.

:func:`command` puts words before a command that run it in a new network namespace. The only interface in it is the
loopback, and every IPv4 and IPv6 address is local there (``local 0.0.0.0/0 dev lo``): a server that listens on all
addresses gets each connection that anything in the namespace opens, whatever address it names, and sees which one. Names
are asked of 127.0.0.1, where the command may answer. So a test that expects that an address is *not* dialled can fail.

Run as a script, this file is what prepares the namespace and then becomes the command. It refuses to go on where anything
but the loopback is there, or where it is still in a namespace that it came from. It needs no program but ``unshare``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

#: What is changed, and must be this process's own before.
_NAMESPACES = (Path("/proc/self/ns/net"), Path("/proc/self/ns/mnt"))
_LOOPBACK = "lo"

#: Where the system looks for names, and what is there in the namespace: files, then a server on the loopback.
_NAMES = {
    Path("/etc/resolv.conf"): "nameserver 127.0.0.1\noptions timeout:5 attempts:1\n",
    Path("/etc/nsswitch.conf"): "hosts: files dns\n",
}

# linux/sockios.h, linux/if.h, sys/mount.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_MS_BIND = 4096
# linux/netlink.h, linux/rtnetlink.h
_RTM_NEWROUTE, _NLMSG_ERROR = 24, 2
_REQUEST_CREATE_ACK = 0x1 | 0x400 | 0x4
_TABLE_LOCAL, _PROTOCOL_BOOT, _SCOPE_HOST, _TYPE_LOCAL = 255, 3, 254, 2
_RTA_OIF = 4


def command(*words: str) -> list[str]:
    """Return ``words`` with those before them that run them in a network of their own."""
    mapped = () if os.geteuid() == 0 else ("--map-root-user",)
    unshare = shutil.which("unshare") or "unshare"
    return [unshare, *mapped, "--net", "--mount", sys.executable, __file__, _identities(), *words]


def why_not() -> str | None:
    """Return why this machine does not let a test have a network of its own; ``None``: it does."""
    try:
        done = subprocess.run(command("true"), capture_output=True, text=True, check=False)
    except OSError as error:
        return f"unshare cannot be run: {error.strerror}"
    return None if done.returncode == 0 else f"no network namespace can be made: {done.stderr.strip()[-200:]}"


def has_ipv6() -> bool:
    """Whether there are IPv6 addresses; to be asked inside."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect(("2001:db8::1", 9))
    except OSError:
        return False
    return True


def _identities() -> str:
    return ",".join(str(path.stat().st_ino) for path in _NAMESPACES)


def _enter(outside: str) -> None:
    """Prepare the namespaces that this process is in; raises RuntimeError where they are not its own."""
    shared = set(_identities().split(",")) & set(outside.split(","))
    if shared or len(outside.split(",")) != len(_NAMESPACES):
        raise RuntimeError("this is still the network, or the file system, that the test runs in")
    interfaces = [name for _, name in socket.if_nameindex()]
    if interfaces != [_LOOPBACK]:
        raise RuntimeError(f"there are other interfaces than the loopback: {', '.join(interfaces)}")
    _bring_up()
    _make_every_address_local(socket.AF_INET)
    with contextlib.suppress(OSError):  # a machine without IPv6: has_ipv6() says so
        _make_every_address_local(socket.AF_INET6)
    for path, content in _NAMES.items():
        if path.exists():
            _put_in_place(path, content)


def _bring_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        asked = struct.pack("16sH22x", _LOOPBACK.encode(), 0)
        (flags,) = struct.unpack("16xH22x", fcntl.ioctl(control, _SIOCGIFFLAGS, asked))
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", _LOOPBACK.encode(), flags | _IFF_UP))


def _make_every_address_local(family: int) -> None:
    """Add the route ``local default dev lo``; raises OSError where the kernel does not take it."""
    route = struct.pack("=8BI", family, 0, 0, 0, _TABLE_LOCAL, _PROTOCOL_BOOT, _SCOPE_HOST, _TYPE_LOCAL, 0)
    route += struct.pack("=HHI", 8, _RTA_OIF, socket.if_nametoindex(_LOOPBACK))
    message = struct.pack("=IHHII", 16 + len(route), _RTM_NEWROUTE, _REQUEST_CREATE_ACK, 1, 0) + route
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(message)
        answer = netlink.recv(4096)
    _, kind, _, _, _, error = struct.unpack("=IHHIIi", answer[:20])
    if kind != _NLMSG_ERROR or error:
        raise OSError(-error, os.strerror(-error))


def _put_in_place(path: Path, content: str) -> None:
    """Let ``path`` have another content, in this mount namespace."""
    with tempfile.NamedTemporaryFile("w", suffix=path.name) as other:
        other.write(content)
        other.flush()
        libc = ctypes.CDLL(None, use_errno=True)
        source, target = os.fsencode(other.name), os.fsencode(path.resolve())
        if libc.mount(source, target, None, _MS_BIND, None):
            raise OSError(ctypes.get_errno(), f"{path} cannot be put in place")


if __name__ == "__main__":
    _enter(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
