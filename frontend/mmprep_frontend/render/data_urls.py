"""Data URLs of a request, taken out of its JSON before that is parsed.

Data URLs are nearly all of the bytes of a request with pictures. A JSON parser looks at each byte and copies them into a
text; from there the base64 would be copied again. Two searches of the C library find where such a URL ends thirty times
as fast, and it is read where it lies.

Rules
-----
- A URL is taken out where it is a value that the JSON spells without a backslash. A word that nobody can guess stands in
  its place.
- Each of these words must come back as the URL of a medium, see :meth:`Taken.are_media_of`. Otherwise, and where what is
  left cannot be read, the whole is to be parsed as it came: a URL may be anything else, as text or an argument of a tool.
- What is in a URL is looked at where its base64 is decoded, as strictly as JSON would be.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from mmprep_frontend.render.conversation import MediaPart, media_urls
from mmprep_frontend.render.parts import Message

_OPENING: Final = b'"data:'
#: Bytes of a URL that is worth it, and of a request that is searched: it takes 0.1 ms a MB, at worst 1.
_LEAST, _LARGEST = 4 << 10, 4 << 20
#: How many are looked at.
_MOST: Final = 256
_SECRET: Final = secrets.token_hex(16)


@dataclass(frozen=True)
class Taken:
    """A request's JSON, and the data URLs that were taken out of it.

    Attributes
    ----------
    json: what is left, with a word in the place of each URL.
    urls: by these words: views of the request.
    """

    json: bytes | memoryview
    urls: Mapping[str, memoryview] = field(default_factory=dict)

    def are_media_of(self, messages: Sequence[Message]) -> bool:
        """Whether each of the URLs is a medium's."""
        return sum(url in self.urls for url in media_urls(messages)) == len(self.urls)

    def put_back(self, media: Sequence[MediaPart]) -> list[MediaPart]:
        """Return the media with their URLs in the place of the words."""
        return [replace(part, url=self.urls.get(str(part.url), part.url)) for part in media]


def take_out(body: bytes | memoryview) -> Taken:
    """Return a request without its large data URLs, and these; nothing is taken out of a view."""
    if isinstance(body, memoryview) or not _LEAST <= len(body) <= _LARGEST:
        return Taken(body)
    pieces: list[bytes | memoryview] = []
    urls: dict[str, memoryview] = {}
    view, done, at = memoryview(body), 0, body.find(_OPENING)
    for _ in range(_MOST):
        end = body.find(b'"', at + 1)
        if at < 1 or end < 0:
            break
        if end - at > _LEAST and body[at - 1] in b": " and body.find(b"\\", at, end) < 0:
            word = f"{_SECRET}-{len(urls)}"
            urls[word] = view[at + 1 : end]
            pieces += [view[done : at + 1], word.encode()]
            done = end
        at = body.find(_OPENING, end)
    return Taken(b"".join([*pieces, view[done:]]), urls) if urls else Taken(body)
