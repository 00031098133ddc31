"""Which URLs and which addresses the service may read from. Pure: nothing is resolved or dialled here.

Two judgements, and a fetch needs both:

- :meth:`UrlPolicy.judge_url` takes a URL apart *once* and gives back a :class:`Target` in normal form. Everything after
  it works on the target, never on the sender's text: where two parsers read a text differently, one of them is wrong
  about the host. What browsers repair (backslashes, white space, ``0x7f.1``) is refused instead.
- :meth:`UrlPolicy.judge_address` takes an address that a name resolved to. Only globally routable ones pass. It must be
  asked about every address of a name, and the connection must go to an address that was judged, not to the name again.

Messages never hold the address that a name resolved to: they would make the service a map of the inner network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final
from urllib.parse import quote, urljoin

import idna

from mmprep.errors import FetchError, Forbidden, InvalidRequest, StartupError

#: Longest URL that is looked at, in characters; servers accept about as much.
MAX_URL_LENGTH: Final = 8192

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,31})://(?P<authority>[^/?#]*)(?P<rest>[^#]*)", re.ASCII)
_BRACKETED = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::([0-9]{1,5}))?", re.ASCII)
_NAMED = re.compile(r"([^:\[\]%]+)(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_-]{1,63}", re.ASCII)
#: A host that ends so is read as an IPv4 address by the system's own parser (inet_aton).
_NUMERIC_END = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.ASCII)

# The IANA registries of special-purpose addresses, RFC 6890 and its updates, without the entries that are global.
_REFUSED_V4: Final = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier NAT
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # public by number, yet a platform's inner service on every machine of that cloud (Azure)
        "169.254.0.0/16",  # link-local, and most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
#: The only part of the IPv6 space that is given out for global unicast.
_GLOBAL_V6: Final = IPv6Network("2000::/3")
_REFUSED_V6: Final = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: benchmarks, ORCHID; Teredo is judged before
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
)
#: Forms that carry one IPv4 address: the network, and how far to shift it down.
_EMBEDDING_V6: Final = (
    (IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (IPv6Network("::/96"), 0),  # IPv4-compatible, and with it :: and ::1
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (IPv6Network("2002::/16"), 80),  # 6to4
)
_TEREDO: Final = IPv6Network("2001::/32")
#: RFC 5214: an interface identifier that carries an IPv4 address, whatever the prefix; with and without the bit for
#: "globally unique".
_ISATAP: Final = frozenset({0x00005EFE, 0x02005EFE})

_FORBIDDEN_ADDRESS = (
    "the URL's host is not on the public network; this service reads only from public addresses (it is started without "
    "--allow-private-networks)"
)


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that was judged, in normal form.

    Attributes
    ----------
    scheme: ``http`` or ``https``.
    host: lower-case ASCII name without trailing dot, or an IP address in its canonical spelling, without brackets.
    port: 1 to 65535.
    path: path and query as they are sent, percent-encoded, beginning with ``/``.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        """The URL in normal form, without fragment."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"

    @property
    def origin(self) -> str:
        """The URL in normal form with nothing but ``/`` as its path: what the policy looks at, and no secret."""
        return replace(self, path="/").url


@dataclass(frozen=True, slots=True)
class _Pattern:
    """One entry of the allowed hosts: a host or all below it, at one port or every one."""

    host: str
    below: bool
    port: int | None

    def matches(self, target: Target) -> bool:
        if self.port not in {None, target.port}:
            return False
        return target.host.endswith(f".{self.host}") if self.below else target.host == self.host


@dataclass(frozen=True)
class UrlPolicy:
    """What may be read.

    Parameters
    ----------
    allowed_domains:
        Where not empty, the only hosts allowed: ``example.com`` exactly that, ``*.example.com`` all below it and not
        itself; at every port, or with ``:8443`` behind it at that one alone.
    allow_private:
        Also addresses that are not globally routable. For tests, and for services whose media lie in their own network.

    Raises
    ------
    mmprep.errors.StartupError
        An entry of ``allowed_domains`` is no host name.
    """

    allowed_domains: tuple[str, ...] = ()
    allow_private: bool = False
    _allowed: tuple[_Pattern, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_allowed", tuple(map(_read_pattern, self.allowed_domains)))

    def judge_url(self, url: str) -> Target:
        """Return ``url`` in normal form, if it may be read as far as its text tells.

        Raises
        ------
        mmprep.errors.InvalidRequest
            Not a proper http or https URL.
        mmprep.errors.Forbidden
            A proper one that must not be read: credentials, a host outside ``allowed_domains``, an IP address that
            is not public or is spelled in an odd way.
        """
        target = _parse(url)
        if self._allowed and not any(pattern.matches(target) for pattern in self._allowed):
            raise Forbidden(
                "the URL's host or port is not one of those that this service reads from (--allowed-media-domains)"
            )
        literal = _literal(target.host)
        if literal is not None:
            self.judge_address(literal)
        return target

    def judge_redirect(self, origin: Target, location: str) -> Target:
        """Return where a redirect leads, judged like any URL.

        Parameters
        ----------
        origin:
            Whose answer the redirect is.
        location:
            The header's value; may be relative.

        Raises
        ------
        mmprep.errors.FetchError
            The host redirects to what is no proper http or https URL.
        mmprep.errors.Forbidden
            It redirects to what must not be read.
        """
        try:
            # urljoin drops some characters silently, so they are refused before.
            _refuse_bad_characters(location)
            return self.judge_url(urljoin(origin.url, location))
        except Forbidden as error:
            raise Forbidden(f"the host redirects to another URL: {error.message}") from None
        except (InvalidRequest, ValueError):
            raise FetchError("the host redirects to something that is no proper http or https URL") from None

    def judge_address(self, address: str | IPv4Address | IPv6Address) -> None:
        """Let pass an address that may be dialled.

        Raises
        ------
        mmprep.errors.Forbidden
            It is not globally routable (or no address at all), and private ones are not allowed.
        """
        if self.allow_private:
            return
        try:
            parsed = ip_address(address) if isinstance(address, str) else address
        except ValueError:
            raise Forbidden(_FORBIDDEN_ADDRESS) from None
        if not _is_public(parsed):
            raise Forbidden(_FORBIDDEN_ADDRESS)


def _refuse_bad_characters(url: str) -> None:
    if not url:
        raise InvalidRequest("the URL is empty")
    if len(url) > MAX_URL_LENGTH:
        raise InvalidRequest(f"the URL is longer than {MAX_URL_LENGTH:,} characters")
    # What is not printable covers control and format characters, every kind of white space but the plain blank, and
    # lone surrogates.
    if not url.isprintable() or " " in url or "\\" in url:
        raise InvalidRequest(
            "the URL holds white space, control characters or backslashes; percent-encode them or leave them out"
        )


def _parse(url: str) -> Target:
    _refuse_bad_characters(url)
    match = _URL.match(url)
    if match is None or match["scheme"].lower() not in _DEFAULT_PORTS:
        raise InvalidRequest("the URL must start with http:// or https://")
    scheme = match["scheme"].lower()
    authority = match["authority"]
    if "@" in authority:
        raise Forbidden("the URL holds a user name or password; leave them out")
    if authority.startswith("["):
        parts = _BRACKETED.fullmatch(authority)
        host = _canonical_v6(parts[1]) if parts else None
    else:
        parts = _NAMED.fullmatch(authority)
        host = _normal_host(parts[1]) if parts else None
    if parts is None or host is None:
        raise InvalidRequest("the URL's host or port is malformed")
    port = int(parts[2]) if parts[2] else _DEFAULT_PORTS[scheme]
    if not 1 <= port <= 65535:
        raise InvalidRequest("the URL's port is not a number from 1 to 65535")
    rest = quote(match["rest"], safe="/?%:@!$&'()*+,;=~-._[]")
    return Target(scheme, host, port, rest if rest.startswith("/") else f"/{rest}")


def _canonical_v6(text: str) -> str | None:
    try:
        return str(IPv6Address(text))
    except AddressValueError:
        return None


def _normal_host(host: str) -> str | None:
    """Return a name or IPv4 address in normal form, ``None`` where malformed; refuse odd spellings of addresses."""
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            return None
    host = host.lower().removesuffix(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in host.split(".")):
        return None
    if _NUMERIC_END.fullmatch(host):
        try:
            return str(IPv4Address(host))
        except AddressValueError:
            raise Forbidden("the URL's host is an IP address in an unusual spelling; write it as 1.2.3.4") from None
    return host


def _read_pattern(text: str) -> _Pattern:
    rest = text.removeprefix("*.")
    parts = _BRACKETED.fullmatch(rest) or _NAMED.fullmatch(rest)
    try:
        host = None if parts is None else _canonical_v6(parts[1]) if rest.startswith("[") else _normal_host(parts[1])
    except Forbidden:
        host = None
    below = rest != text
    port = int(parts[2]) if parts is not None and parts[2] else None
    # Nothing is below an address.
    if host is None or (below and _literal(host)) or not (port is None or 1 <= port <= 65535):
        raise StartupError(
            f"--allowed-media-domains: {text!r} is neither a host name nor *.host name, with or without :port"
        )
    return _Pattern(host, below, port)


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _REFUSED_V4)
    # A scope (fe80::1%eth0) takes no part in the comparison with networks.
    plain = IPv6Address(int(address))
    for network, shift in _EMBEDDING_V6:
        if plain in network:
            return _is_public(IPv4Address((int(plain) >> shift) & 0xFFFFFFFF))
    if plain in _TEREDO:
        # RFC 4380: the server in bits 32 to 63, the client in the last 32, inverted.
        server = IPv4Address((int(plain) >> 64) & 0xFFFFFFFF)
        client = IPv4Address(~int(plain) & 0xFFFFFFFF)
        return _is_public(server) and _is_public(client)
    if (int(plain) >> 32) & 0xFFFFFFFF in _ISATAP and not _is_public(IPv4Address(int(plain) & 0xFFFFFFFF)):
        return False
    return plain in _GLOBAL_V6 and not any(plain in network for network in _REFUSED_V6)
