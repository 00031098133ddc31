from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL

from mmprep.errors import FetchError, Forbidden, InvalidRequest, MediaError, StartupError
from mmprep_frontend.media.policy import MAX_URL_LENGTH, Target, UrlPolicy

OPEN = UrlPolicy()

REFUSED_ADDRESSES = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.127.255.254",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::10.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.1.2.3",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::808:808",
    "100::1",
    "2001::1",
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "2002:c0a8:101::1",
    "3fff::1",
    "3fff:fff::1",
    "4000::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "2001:0:7f00:1::f7f7:f7f7",
    "2001:0:808:808::80ff:fffe",
    "2606:4700::5efe:10.0.0.1",
    "2606:4700::200:5efe:a9fe:a9fe",
]

PUBLIC_ADDRESSES = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "191.255.255.255",
    "192.0.1.1",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2000::1",
    "2606:4700::1111",
    "2a00:1450:4001::200e",
    "3ffe::1",
    "3fff:1000::1",
    "::8.8.8.8",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "2002:808:808::1",
    "2001:0:808:808::f7f7:f7f7",
    "2606:4700::5efe:8.8.8.8",
]


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
def test_an_address_that_is_not_public_is_refused_without_being_named(address: str) -> None:
    with pytest.raises(Forbidden) as caught:
        OPEN.judge_address(address)
    assert address not in caught.value.message


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_a_public_address_passes(address: str) -> None:
    OPEN.judge_address(address)


@pytest.mark.parametrize("address", REFUSED_ADDRESSES + PUBLIC_ADDRESSES)
def test_where_private_networks_are_allowed_every_address_passes(address: str) -> None:
    UrlPolicy(allow_private=True).judge_address(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_the_same_in_every_ipv6_form_that_carries_it(address: ipaddress.IPv4Address) -> None:
    bits = int(address)
    forms = [
        (0xFFFF << 32) | bits,
        bits,
        (0x64FF9B << 96) | bits,
        (0x2002 << 112) | (bits << 80) | 0x1234,
        (0x20010000 << 96) | (0x08080808 << 64) | (bits ^ 0xFFFFFFFF),
        (0x20010000 << 96) | (bits << 64) | (0x08080808 ^ 0xFFFFFFFF),
        (0x26064700 << 96) | (0x00005EFE << 32) | bits,
        (0x26064700 << 96) | (0x02005EFE << 32) | bits,
    ]
    assert {_passes(ipaddress.IPv6Address(form)) for form in forms} == {_passes(address)}


@given(st.ip_addresses())
@example(ipaddress.ip_address("192.88.99.1"))
@example(ipaddress.ip_address("fec0::1"))
@example(ipaddress.ip_address("5f00::1"))
def test_nothing_passes_that_the_standard_library_does_not_call_global(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    embedded = isinstance(address, ipaddress.IPv6Address) and (
        address.ipv4_mapped or address.sixtofour or address.teredo or int(address) >> 32 in {0, 0x64FF9B << 64}
    )
    local = address.is_multicast or address.is_reserved or address.is_link_local or address.is_loopback
    if not embedded and (local or not address.is_global):
        assert not _passes(address)


def _passes(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        OPEN.judge_address(address)
    except Forbidden:
        return False
    return True


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://example.com", "http://example.com/"),
        ("HTTPS://Example.COM:443/A?b=C", "https://example.com/A?b=C"),
        ("http://example.com:80/", "http://example.com/"),
        ("https://example.com:80/", "https://example.com:80/"),
        ("http://example.com./x", "http://example.com/x"),
        ("http://example.com?q=1", "http://example.com/?q=1"),
        ("http://example.com/a#fragment", "http://example.com/a"),
        ("http://bücher.example/ü?ü=%20", "http://xn--bcher-kva.example/%C3%BC?%C3%BC=%20"),
        ("http://exa。mple.com/", "http://exa.mple.com/"),
        ("http://my_bucket.example.com/a%2Fb", "http://my_bucket.example.com/a%2Fb"),
        ("http://1.1.1.1/", "http://1.1.1.1/"),
        ("http://[2606:4700:0:0::1111]:8080/", "http://[2606:4700::1111]:8080/"),
        ("http://example.com/a@b:c", "http://example.com/a@b:c"),
        ('http://example.com/<">', "http://example.com/%3C%22%3E"),
    ],
)
def test_a_url_is_brought_to_normal_form(url: str, normal: str) -> None:
    assert OPEN.judge_url(url).url == normal


@pytest.mark.parametrize("url", ["http://Example.com./a/b?c#d", "https://[2606:4700::1111]:8080/?a", "http://1.1.1.1"])
def test_an_origin_is_judged_as_its_url_and_holds_no_path(url: str) -> None:
    target = OPEN.judge_url(url)
    origin = OPEN.judge_url(target.origin)
    assert (origin.scheme, origin.host, origin.port) == (target.scheme, target.host, target.port)
    assert origin.path == "/"


def test_a_target_holds_the_parts_of_its_url() -> None:
    assert OPEN.judge_url("https://Example.com.:8443/a?b#c") == Target("https", "example.com", 8443, "/a?b")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com/a",
        "//example.com/a",
        "http:/example.com",
        "http:example.com",
        "http://",
        "http:///a",
        "http://:80/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "data:,x",
        "javascript:alert(1)",
        " http://example.com/",
        "http://example.com/ a",
        "http://example.com/a\n",
        "http://example.com\t/",
        "http://exam\x00ple.com/",
        "http://example.com/\u00a0",
        "http://example.com/\u200b",
        "http://example.com/\ud800",
        "http://example.com\\@evil.example/",
        "http:\\\\example.com/",
        "http://example.com:port/",
        "http://example.com:/",
        "http://example.com:0/",
        "http://example.com:65536/",
        "http://example.com:80:80/",
        "http://example.com:٨٠/",
        "http://exa%6dple.com/",
        "http://example..com/",
        "http://.example.com/",
        "http://example.com../",
        "http://exam!ple.com/",
        "http://[::1/",
        "http://::1/",
        "http://[::1]x/",
        "http://[fe80::1%25eth0]/",
        "http://[v1.x]/",
        "http://" + "a" * 64 + ".com/",
        "http://" + "a." * 130 + "com/",
        "http://example.com/" + "a" * MAX_URL_LENGTH,
    ],
)
def test_a_url_that_is_not_proper_is_an_invalid_request(url: str) -> None:
    with pytest.raises(InvalidRequest):
        OPEN.judge_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://user@example.com/",
        "http://user:secret@example.com/",
        "http://@example.com/",
        "http://example.com@127.0.0.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://0x/",
        "http://017700000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127.0.1/",
        "http://0/",
        "http://1.2.3.4.5/",
        "http://256.1.1.1/",
        "http://example.123/",
        "http://08.8.8.8/",
        "http://\uff11\uff12\uff17.\uff11/",
        "http://127.0.0.1/",
        "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/",
        "http://127.0.0.1./",
        "http://10.0.0.1:8080/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[64:ff9b::a00:1]/",
        "http://[fd00::1]/",
    ],
)
def test_a_url_that_must_not_be_read_is_forbidden(url: str) -> None:
    with pytest.raises(Forbidden):
        OPEN.judge_url(url)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("example.com", True),
        ("EXAMPLE.com.", True),
        ("www.example.com", False),
        ("notexample.com", False),
        ("example.com.evil.example", False),
        ("cdn.test", False),
        ("a.cdn.test", True),
        ("a.b.cdn.test", True),
        ("evilcdn.test", False),
        ("bücher.example", True),
        ("1.1.1.1", False),
    ],
)
def test_where_domains_are_listed_only_they_are_read(host: str, allowed: bool) -> None:
    policy = UrlPolicy(allowed_domains=("Example.COM.", "*.cdn.test", "bücher.example"))
    if allowed:
        policy.judge_url(f"https://{host}/x")
    else:
        with pytest.raises(Forbidden):
            policy.judge_url(f"https://{host}/x")


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://example.com:8080/", True),
        ("http://example.com:08080/", True),
        ("http://example.com/", False),
        ("https://example.com/", False),
        ("https://a.cdn.test/", True),
        ("https://a.cdn.test:443/", True),
        ("http://a.cdn.test:443/", True),
        ("http://a.cdn.test/", False),
        ("https://cdn.test/", False),
        ("https://any.example:9999/", True),
        ("http://[2606:4700::1111]:81/", True),
        ("http://[2606:4700:0::1111]/", False),
    ],
)
def test_an_entry_with_a_port_allows_this_one_alone_and_one_without_allows_all(url: str, allowed: bool) -> None:
    policy = UrlPolicy(("example.com:8080", "*.cdn.test:443", "any.example", "[2606:4700:0:0::1111]:81"))
    if allowed:
        policy.judge_url(url)
    else:
        with pytest.raises(Forbidden):
            policy.judge_url(url)


def test_a_redirect_to_another_port_of_a_listed_host_is_judged_like_a_url() -> None:
    policy = UrlPolicy(("example.com:443",))
    origin = policy.judge_url("https://example.com/a")
    assert policy.judge_redirect(origin, "/b").url == "https://example.com/b"
    for location in ("http://example.com/", "//example.com:22/", "https://example.com:8443/"):
        with pytest.raises(Forbidden):
            policy.judge_redirect(origin, location)


def test_a_listed_domain_does_not_make_private_addresses_readable() -> None:
    policy = UrlPolicy(allowed_domains=("127.0.0.1",))
    with pytest.raises(Forbidden):
        policy.judge_url("http://127.0.0.1/")


@pytest.mark.parametrize(
    "domain",
    [
        "",
        "*",
        "*.",
        "http://example.com",
        "exa mple.com",
        "*.*.com",
        "127.1",
        "a:b",
        "a.example:",
        "a.example:0",
        "a.example:65536",
        "::1",
        "[::1",
        "*.[::1]",
        "*.8.8.8.8",
        "*a.example",
    ],
)
def test_a_domain_that_is_no_host_name_stops_the_start_and_names_the_option(domain: str) -> None:
    with pytest.raises(StartupError, match="--allowed-media-domains"):
        UrlPolicy(allowed_domains=(domain,))


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/b", "https://example.com/b"),
        ("b?c", "https://example.com/dir/b?c"),
        ("//other.example/x", "https://other.example/x"),
        ("http://other.example:8080/", "http://other.example:8080/"),
    ],
)
def test_a_redirect_may_be_relative(location: str, url: str) -> None:
    assert OPEN.judge_redirect(OPEN.judge_url("https://example.com/dir/a"), location).url == url


@pytest.mark.parametrize(
    "location",
    [
        "",
        "ftp://example.com/",
        "file:///etc/passwd",
        "data:image/png;base64,AA==",
        "http://[::1",
        "/a\tb",
        "\\\\evil.example",
        "http://",
        "http:///a",
        "http://example.com:0/",
    ],
)
def test_a_redirect_to_what_is_no_url_is_the_hosts_fault(location: str) -> None:
    with pytest.raises(FetchError) as caught:
        OPEN.judge_redirect(OPEN.judge_url("https://example.com/"), location)
    assert caught.value.code == 422


@pytest.mark.parametrize("location", ["http://127.0.0.1/", "//10.0.0.1/", "http://u:p@example.com/", "http://127.1/"])
def test_a_redirect_to_what_must_not_be_read_is_forbidden(location: str) -> None:
    with pytest.raises(Forbidden) as caught:
        OPEN.judge_redirect(OPEN.judge_url("https://example.com/"), location)
    assert "redirects" in caught.value.message


_AWKWARD = st.text(
    st.sampled_from("http://exampl.com127:08@[]#?%\\ \t\n\x00.-_0xfFäß。\uff112\uff16:/;&=") | st.characters(),
    max_size=40,
)


@given(_AWKWARD | _AWKWARD.map("http://".__add__) | _AWKWARD.map("https://example.com".__add__))
@example("http://example.com\\@127.0.0.1/")
@example("http://example.com#@127.0.0.1/")
@example("http://example.com?@127.0.0.1/")
def test_what_passes_is_read_the_same_by_the_client_library_and_stays_as_it_is(url: str) -> None:
    try:
        target = OPEN.judge_url(url)
    except (InvalidRequest, MediaError):
        return
    assert target.url.isascii()
    seen = URL(target.url, encoded=True)
    assert (seen.scheme, seen.raw_host, seen.port) == (target.scheme, target.host, target.port)
    assert seen.raw_path_qs == target.path
    assert urlsplit(target.url).hostname == target.host
    assert OPEN.judge_url(target.url) == target
