from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep.errors import InvalidRequest, MmprepError, TooLarge
from mmprep_frontend.media.sources import DataSource, FileSource, HttpSource, inline_source, parse_source

PARAM = "messages[0].content[1].image_url"


def parse(url: str, max_bytes: int = 1000) -> DataSource | HttpSource | FileSource:
    return parse_source(url, param=PARAM, max_bytes=max_bytes)


@pytest.mark.parametrize("url", ["http://a.example/x", "https://a.example/x", "HTTPS://a.example/x"])
def test_an_http_url_is_kept_as_it_is(url: str) -> None:
    assert parse(url) == HttpSource(url)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,QUJD",
        "DATA:Image/PNG;BASE64,QUJD",
        "data:;base64,QUJD",
        "data:audio/wav;codecs=1;rate=16000;base64,QUJD",
        "data:image/png; base64,QUJD",
    ],
)
def test_a_data_url_of_any_type_gives_its_bytes(url: str) -> None:
    source = parse(url)
    assert isinstance(source, DataSource)
    assert (source.decode(), source.size) == (b"ABC", 3)


@given(st.binary(min_size=1, max_size=200), st.booleans())
def test_padding_is_optional_and_the_size_is_known_before_decoding(data: bytes, padded: bool) -> None:
    payload = base64.b64encode(data).decode()
    source = inline_source(payload if padded else payload.rstrip("="), param=None, max_bytes=len(data))
    assert source.size == len(data)
    assert source.decode() == data


@pytest.mark.parametrize(
    "payload",
    [
        "Q",
        "QUJDR",
        "QU JD",
        "QUJD\n",
        "QU\r\nJD",
        "QUI_",
        "QU-I",
        "QUI%3D",
        "Q=UJ",
        "QUI==",
        "====",
        "QÜJD",
        "=",
        "QUJD*",
    ],
)
def test_what_is_not_strict_base64_is_refused_and_the_place_is_named(payload: str) -> None:
    source = parse(f"data:image/png;base64,{payload}")
    assert isinstance(source, DataSource)
    with pytest.raises(InvalidRequest, match="base64") as caught:
        source.decode()
    assert caught.value.param == PARAM


def test_an_empty_data_url_is_refused() -> None:
    source = parse("data:image/png;base64,")
    assert isinstance(source, DataSource)
    with pytest.raises(InvalidRequest, match="empty"):
        source.decode()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,abc",
        "data:,abc",
        "data:text/plain;charset=utf-8,abc",
        "data:base64,QUJD",
        "data:image/png;base64x,QUJD",
    ],
)
def test_a_data_url_that_is_not_base64_is_refused_with_the_form_that_works(url: str) -> None:
    with pytest.raises(InvalidRequest, match="data:<type>;base64,<data>") as caught:
        parse(url)
    assert caught.value.param == PARAM


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:" + "x" * 2000 + ";base64,QUJD"])
def test_a_data_url_without_a_comma_near_its_start_is_malformed(url: str) -> None:
    with pytest.raises(InvalidRequest, match="malformed"):
        parse(url)


def test_data_above_the_limit_is_refused_before_it_is_decoded_and_the_option_is_named() -> None:
    # Not base64 at all: only the length has been looked at.
    with pytest.raises(TooLarge, match="--max-media-size") as caught:
        parse("data:image/png;base64," + "*" * 1400)
    assert caught.value.param == PARAM
    assert isinstance(parse("data:image/png;base64," + "QUJD" * 333 + "QQ=="), DataSource)


def outcome(url: str | memoryview) -> tuple[object, ...]:
    try:
        source = parse_source(url, param=PARAM, max_bytes=1000)
        assert isinstance(source, DataSource)
        return source.size, source.decode()
    except MmprepError as error:
        return type(error), error.message, error.param


@given(
    st.sampled_from(("data:image/png;base64,", "data:;base64,", "data:image/png,", "data:é;base64,", "data:")),
    st.one_of(st.binary(max_size=50).map(base64.b64encode).map(bytes.decode), st.text("QU=J-_ \né", max_size=9)),
    st.integers(0, 2),
)
def test_a_view_of_a_data_url_is_read_as_the_url_itself(head: str, payload: str, cut: int) -> None:
    url = head + payload[: len(payload) - cut]
    assert outcome(memoryview(url.encode())) == outcome(url)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "FILE:/x", "ftp://a.example/x", "blob:abc", "s3://bucket/key"])
def test_another_scheme_is_refused_with_those_that_are_supported(url: str) -> None:
    with pytest.raises(InvalidRequest, match="supported are http://, https:// and data:") as caught:
        parse(url)
    assert url.split(":", maxsplit=1)[0].lower() in caught.value.message
    assert "passwd" not in caught.value.message


@pytest.mark.parametrize("url", ["ftp://a.example/x", "cat.png"])
def test_where_files_are_read_file_urls_are_among_those_that_are_supported(url: str) -> None:
    with pytest.raises(InvalidRequest, match="supported are http://, https://, data: and file: URLs"):
        parse_source(url, param=PARAM, max_bytes=1, local_files=True)


@pytest.mark.parametrize("url", ["", "QUJD", "/etc/passwd", "iVBORw0KGgo=" * 50, ":", "//a.example/x"])
def test_what_is_no_url_is_refused_with_what_raw_base64_needs(url: str) -> None:
    with pytest.raises(InvalidRequest, match="data:<type>;base64,"):
        parse(url)


def test_a_file_url_names_the_option_where_there_is_no_directory_for_files() -> None:
    with pytest.raises(InvalidRequest, match="--allowed-local-media-path") as caught:
        parse("file:///data/secret.png")
    assert (caught.value.code, caught.value.param) == (400, PARAM)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "components"),
    [
        ("file:///a/b.png", (b"a", b"b.png")),
        ("FILE://LocalHost/a/b.png", (b"a", b"b.png")),
        ("file:/a/b.png", (b"a", b"b.png")),
        ("file:///a%20b/%2e%2e.png", (b"a b", b"...png")),
        ("file:///a/%252e%252e/b", (b"a", b"%2e%2e", b"b")),
        ("file:///%C3%A4/ä%FF%3F", ("ä".encode(), "ä".encode() + b"\xff?")),
        ("file:///a/...", (b"a", b"...")),
    ],
)
def test_a_file_url_is_decoded_once(url: str, components: tuple[bytes, ...]) -> None:
    source = parse_source(url, param=PARAM, max_bytes=1, local_files=True)
    assert source == FileSource(components, PARAM)


@pytest.mark.parametrize(
    "url",
    [
        "file:",
        "file://",
        "file:///",
        "file:a/b",
        "file://host/a",
        "file://127.0.0.1/a",
        "file://user@localhost/a",
        "file://localhost:80/a",
        "file:////a",
        "file:///a//b",
        "file:///a/",
        "file:///a/./b",
        "file:///a/../b",
        "file:///a/%2e%2E/b",
        "file:///a/.%2e/b",
        "file:///a/..%2fb",
        "file:///a%00b",
        "file:///a%",
        "file:///a%zz",
        "file:///a b",
        "file:///a\n",
        "file:///a\\b",
        "file:///a?b",
        "file:///a#b",
        "file:///\ud800",
        "file:///" + "a" * 9000,
    ],
)
def test_a_file_url_that_could_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="file URL") as caught:
        parse_source(url, param=PARAM, max_bytes=1, local_files=True)
    assert caught.value.param == PARAM


@pytest.mark.parametrize(
    "url", ["file://host/a", "file://127.0.0.1/a", "file://a.png", "FILE://localhost:80/a", "file://localhost"]
)
def test_a_host_in_a_file_url_is_told_as_what_it_is(url: str) -> None:
    with pytest.raises(InvalidRequest, match="of no other host; write file:///directory/file"):
        parse_source(url, param=PARAM, max_bytes=1, local_files=True)
