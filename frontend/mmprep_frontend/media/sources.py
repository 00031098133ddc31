"""Where a request says that a medium lies: in a data URL, at an http(s) URL, or in a file. Anything else is refused by name.

Parsing is cheap and happens on the event loop. Decoding base64 is not: :meth:`DataSource.decode` belongs in the one hop
to the executor, together with hashing. The size is judged before, from the length of the text.

A data URL (RFC 2397) is ``data:[type][;name=value]…;base64,payload``. The payload is base64 in the standard alphabet,
with or without its padding, and nothing else: no line breaks, no percent-encoding, no ``-`` and ``_``.

A file URL (RFC 8089) is ``file:///path`` or ``file://localhost/path``, percent-decoded once. ``.`` and ``..`` are refused,
not resolved. Whether the file may be read is judged elsewhere.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

import pybase64

from mmprep.errors import InvalidRequest, TooLarge
from mmprep_frontend.media.policy import MAX_URL_LENGTH

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}):", re.ASCII)
#: What a URL holds without percent-encoding (RFC 3986, pchar), and what lies beyond ASCII.
_FILE = re.compile(r"file:(?://(?:localhost)?)?/((?:[\w\-.~!$&'()*+,;=:@/]|%[0-9A-Fa-f]{2})+)", re.IGNORECASE)
#: Longest head of a data URL, up to its comma, in characters.
_MAX_HEAD: Final = 1024
_SUPPORTED: Final = "supported are http://, https:// and data: URLs"
_SUPPORTED_WITH_FILES: Final = "supported are http://, https://, data: and file: URLs"
#: A host where none may be.
_HOST = re.compile(r"file://(?!/|localhost/)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HttpSource:
    """A medium at an http(s) URL, which nobody has judged yet."""

    url: str


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file of this machine, which nobody has judged yet.

    Attributes
    ----------
    components: the names of the absolute path, from the root on, as bytes.
    param: the place in the request, for errors.
    """

    components: tuple[bytes, ...]
    param: str | None


@dataclass(frozen=True, slots=True)
class DataSource:
    """A medium that the request itself holds, still in base64.

    Attributes
    ----------
    payload: the base64 text.
    param: the place in the request, for errors.
    """

    payload: str | memoryview
    param: str | None

    @property
    def size(self) -> int:
        """Bytes after decoding, exact for proper base64."""
        return _decoded_size(self.payload)

    def decode(self) -> bytes:
        """Return the medium's bytes. Takes 0.2 ms a MB: call it off the event loop.

        Raises
        ------
        mmprep.errors.InvalidRequest
            Not strict base64, or empty.
        """
        payload: str | bytes | memoryview = self.payload
        if missing := -len(payload) % 4:
            payload = payload + "=" * missing if isinstance(payload, str) else bytes(payload) + b"=" * missing
        try:
            decoded: bytes = pybase64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest(
                "the data is not valid base64: use the standard alphabet (A-Z a-z 0-9 + /) without line breaks",
                param=self.param,
            ) from None
        if not decoded:
            raise InvalidRequest("the medium is empty: there is no data behind the comma", param=self.param)
        return decoded


def parse_source(
    url: str | memoryview, *, param: str | None, max_bytes: int, local_files: bool = False
) -> DataSource | HttpSource | FileSource:
    """Return what kind of source ``url`` is.

    Parameters
    ----------
    url:
        As the request holds it; a data URL also as a view of its bytes.
    param:
        The place in the request, as ``messages[0].content[1].image_url``.
    max_bytes:
        Largest medium, in bytes, ``--max-media-size``.
    local_files:
        Whether file URLs are read at all.

    Raises
    ------
    mmprep.errors.InvalidRequest
        No URL, a scheme that is not supported, a malformed file URL, or a data URL that is malformed or not base64.
    mmprep.errors.TooLarge
        The data is longer than ``max_bytes``.
    """
    if isinstance(url, memoryview):
        return _parse_data_url(url, param, max_bytes)
    match = _SCHEME.match(url)
    supported = _SUPPORTED_WITH_FILES if local_files else _SUPPORTED
    if match is None:
        raise InvalidRequest(
            f"this is no URL; {supported} (raw base64 needs 'data:<type>;base64,' before it)", param=param
        )
    scheme = match[1].lower()
    if scheme == "data":
        return _parse_data_url(url, param, max_bytes)
    if scheme in {"http", "https"}:
        return HttpSource(url)
    if scheme == "file":
        if local_files:
            return FileSource(_parse_file_url(url, param), param)
        raise InvalidRequest(
            f"file: URLs are only read by a service that has a directory for them (--allowed-local-media-path); "
            f"{_SUPPORTED}",
            param=param,
        )
    raise InvalidRequest(f"{scheme}: URLs are not supported here; {supported}", param=param)


def inline_source(payload: str | memoryview, *, param: str | None, max_bytes: int) -> DataSource:
    """Return the source for base64 that stands in the request without a URL around it, as in ``input_audio``.

    Raises
    ------
    mmprep.errors.TooLarge
        The data is longer than ``max_bytes``.
    """
    if _decoded_size(payload) > max_bytes:
        raise TooLarge(
            f"the medium is larger than {max_bytes:,} bytes, this service's limit (--max-media-size)", param=param
        )
    return DataSource(payload, param)


def _parse_data_url(url: str | memoryview, param: str | None, max_bytes: int) -> DataSource:
    start = len("data:")
    head = url[: start + _MAX_HEAD]
    if isinstance(head, memoryview):
        head = str(head, "latin-1")
    comma = head.find(",", start)
    if comma < 0:
        raise InvalidRequest("the data URL is malformed: write data:<type>;base64,<data>", param=param)
    # The type may be wrong, and is not looked at.
    _, *parameters = (part.strip().lower() for part in head[start:comma].split(";"))
    if not parameters or parameters[-1] != "base64":
        raise InvalidRequest("the data URL is not base64: write data:<type>;base64,<data>", param=param)
    return inline_source(url[comma + 1 :], param=param, max_bytes=max_bytes)


def _parse_file_url(url: str, param: str | None) -> tuple[bytes, ...]:
    if _HOST.match(url):
        raise InvalidRequest(
            "the file URL does not begin with file:///: this service reads its own files, and those of no other host; "
            "write file:///directory/file",
            param=param,
        )
    match = _FILE.fullmatch(url) if len(url) <= MAX_URL_LENGTH else None
    if match is None:
        raise InvalidRequest(
            f"the file URL is malformed: write file:///directory/file, at most {MAX_URL_LENGTH:,} characters, with "
            "everything percent-encoded that is not a letter, a digit or one of -._~!$&'()*+,;=:@/",
            param=param,
        )
    names = tuple(map(unquote_to_bytes, match[1].split("/")))
    if any(name in {b"", b".", b".."} or b"/" in name or b"\0" in name for name in names):
        raise InvalidRequest(
            "the file URL's path has an empty part, '.', '..', or an encoded '/' or NUL in it; write it without",
            param=param,
        )
    return names


def _decoded_size(payload: str | memoryview) -> int:
    end = payload[-2:] if isinstance(payload, str) else str(payload[-2:], "latin-1")
    padding = 2 if end == "==" else 1 if end.endswith("=") else 0
    return (len(payload) - padding) * 3 // 4
