"""The two encodings of an answer: JSON, and MessagePack for those who want tensors without base64.

Both have the same keys and values; only one item's tensors (an element of ``kwargs_data`` or ``mm_metadata``) differ: raw
bytes in MessagePack, and the very same bytes as base64 in JSON.

A GenerateRequest is a list of parts, in which the tensors are still those that were given: they are copied, or turned into
base64, as they are written (:mod:`mmprep_frontend.render.written`). They come last in it, behind all that is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

import msgspec
import pybase64

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.packing import Piece, array_head, bin_head, map_head
from mmprep_frontend.render.written import Base64, Encoded, Packed, written

#: Elements that are encoded in one call.
_AT_ONCE: Final = 16_384
#: The tensors of an answer's media, by modality; ``None`` for a medium whose tensors are not in it.
_Tensors: TypeAlias = Mapping[str, Sequence[Packed | None]]


class Encoding(Protocol):
    """How answers are encoded.

    Attributes
    ----------
    media_type: of the answer.
    """

    media_type: str

    def encode(self, data: Any) -> bytes:
        """Return an answer of dicts, lists, texts and numbers, encoded.

        Raises
        ------
        InvalidRequest
            The request put something into its answer that the encoding can't hold.
        """

    def long_list(self, elements: Sequence[int] | Sequence[str]) -> Any:
        """Return a list to be put into an answer, encoded piece by piece.

        One call over millions of elements would hold up every other thread.
        """

    def join(self, encoded: Sequence[Encoded]) -> bytes:
        """Return the list of answers that are encoded already."""

    def generate_request(self, answer: Mapping[str, Any]) -> Encoded:
        """Return a GenerateRequest, encoded.

        Parameters
        ----------
        answer: from :func:`mmprep_frontend.render.answer.generate_request`.
        """


class _Json:
    media_type = "application/json"

    def encode(self, data: Any) -> bytes:
        return msgspec.json.encode(data)

    def long_list(self, elements: Sequence[int] | Sequence[str]) -> msgspec.Raw:
        pieces = [msgspec.json.encode(part)[1:-1] for part in _parts(elements)]
        return msgspec.Raw(b"".join((b"[", b",".join(pieces), b"]")))

    def join(self, encoded: Sequence[Encoded]) -> bytes:
        return b"".join((b"[", b",".join(map(_whole, encoded)), b"]"))

    def generate_request(self, answer: Mapping[str, Any]) -> Encoded:
        head, tensors = _apart(answer, self, _base64)
        return [head] if tensors is None else _merged([head[: -len(b"null}}")], *self._tensors(tensors), b"}}"])

    def _tensors(self, items: _Tensors) -> Iterator[bytes | Base64]:
        between = b"{"
        for modality, of_one in items.items():
            yield between + self.encode(modality) + b":["
            for position, item in enumerate(of_one):
                if position:
                    yield b","
                yield b"null" if item is None else Base64(item)
            between = b"],"
        yield b"]}" if items else b"{}"


class _MsgPack:
    media_type = "application/msgpack"

    def encode(self, data: Any) -> bytes:
        try:
            return msgspec.msgpack.encode(data)
        except OverflowError:
            raise InvalidRequest(
                "The request holds an integer of more than 64 bits, which would be in the answer and which MessagePack "
                "does not have; send a smaller one, or ask for JSON."
            ) from None

    def long_list(self, elements: Sequence[int] | Sequence[str]) -> msgspec.Raw:
        pieces = [msgspec.msgpack.encode(part)[len(array_head(len(part))) :] for part in _parts(elements)]
        return msgspec.Raw(b"".join((array_head(len(elements)), *pieces)))

    def join(self, encoded: Sequence[Encoded]) -> bytes:
        return b"".join((array_head(len(encoded)), *map(_whole, encoded)))

    def generate_request(self, answer: Mapping[str, Any]) -> Encoded:
        head, tensors = _apart(answer, self, b"".join)
        return [head] if tensors is None else _merged([head[:-1], *_tensors(tensors)])


JSON: Final[Encoding] = _Json()
MSGPACK: Final[Encoding] = _MsgPack()


def _apart(
    answer: Mapping[str, Any], encoding: Encoding, metadata: Callable[[Sequence[Piece]], Any]
) -> tuple[bytes, _Tensors | None]:
    """Return an answer without its tensors, encoded, and these. What ends it is the null in their place, and in JSON two maps.

    What is last in a map is last in its form.
    """
    whole = {**answer, "token_ids": _ids(answer["token_ids"], encoding)}
    features = whole.pop("features")
    if features is None:
        return encoding.encode({**whole, "features": None}), None
    plain = {**features, "mm_metadata": _each(features["mm_metadata"], metadata)}
    tensors = plain.pop("kwargs_data")
    return encoding.encode({**whole, "features": {**plain, "kwargs_data": None}}), tensors


def _ids(token_ids: Sequence[int], encoding: Encoding) -> Any:
    return encoding.long_list(token_ids) if len(token_ids) > _AT_ONCE else token_ids


def _parts(elements: Sequence[int] | Sequence[str]) -> Iterator[Sequence[int] | Sequence[str]]:
    for start in range(0, len(elements), _AT_ONCE):
        yield elements[start : start + _AT_ONCE]


def _each(items: Mapping[str, Sequence[Any]] | None, encode: Callable[[Any], Any]) -> dict[str, list[Any]] | None:
    """Return what ``encode`` makes of each item that is there, by modality."""
    if items is None:
        return None
    return {name: [None if item is None else encode(item) for item in of_one] for name, of_one in items.items()}


def _base64(item: Sequence[Piece]) -> msgspec.Raw:
    """Return base64 as a string that is encoded already: a ``str`` would be searched for escapes."""
    return msgspec.Raw(b"".join((b'"', pybase64.b64encode(b"".join(item)), b'"')))


def _tensors(items: _Tensors) -> Iterator[bytes | Packed]:
    yield map_head(len(items))
    for modality, of_one in items.items():
        yield msgspec.msgpack.encode(modality)
        yield array_head(len(of_one))
        for item in of_one:
            if item is None:
                yield b"\xc0"
                continue
            yield bin_head(len(item))
            yield item


def _merged(parts: Iterable[bytes | Packed | Base64]) -> list[bytes | Packed | Base64]:
    """Return the parts with those joined that are bytes and stand together."""
    merged: list[bytes | Packed | Base64] = []
    small: list[bytes] = []
    for part in parts:
        if isinstance(part, bytes):
            small.append(part)
            continue
        merged += (b"".join(small), part)
        small.clear()
    return [*merged, b"".join(small)]


def _whole(encoded: Encoded) -> bytes:
    return b"".join(written(encoded))
