"""The two encodings of an answer: JSON, and MessagePack for those who want tensors without base64.

Both have the same keys and values; only one item's tensors (an element of ``kwargs_data`` or ``mm_metadata``) differ: raw
bytes in MessagePack, and the very same bytes as base64 in JSON.

A GenerateRequest in MessagePack is a list of pieces, in which the tensors are still those that were given: whoever sends it
writes them one after the other, and nobody joins them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

import msgspec
import pybase64

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.packing import Piece, array_head, bin_head, map_head

#: One answer, encoded: its pieces one behind the other.
Encoded: TypeAlias = Sequence[Piece]
#: Elements that are encoded in one call.
_AT_ONCE: Final = 16_384


class Encoding(Protocol):
    """How answers are encoded.

    Attributes
    ----------
    media_type: of the answer.
    working: bytes that encoding takes for one byte of tensors.
    keeps_tensors: whether the tensors that are given are in the answer themselves, and no copy of them.
    """

    media_type: str
    working: int
    keeps_tensors: bool

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
    # base64 of all items and once more as JSON, and one packed item.
    working = 4
    keeps_tensors = False

    def encode(self, data: Any) -> bytes:
        return msgspec.json.encode(data)

    def long_list(self, elements: Sequence[int] | Sequence[str]) -> msgspec.Raw:
        pieces = [msgspec.json.encode(part)[1:-1] for part in _parts(elements)]
        return msgspec.Raw(b"".join((b"[", b",".join(pieces), b"]")))

    def join(self, encoded: Sequence[Encoded]) -> bytes:
        return b"".join((b"[", b",".join(map(b"".join, encoded)), b"]"))

    def generate_request(self, answer: Mapping[str, Any]) -> Encoded:
        whole = {**answer, "token_ids": _ids(answer["token_ids"], self)}
        features = answer["features"]
        if features is not None:
            texts = {name: _each(features[name], _base64) for name in ("kwargs_data", "mm_metadata")}
            whole["features"] = {**features, **texts}
        return [self.encode(whole)]


class _MsgPack:
    media_type = "application/msgpack"
    working = 1
    keeps_tensors = True

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
        return b"".join((array_head(len(encoded)), *map(b"".join, encoded)))

    def generate_request(self, answer: Mapping[str, Any]) -> Encoded:
        whole = {**answer, "token_ids": _ids(answer["token_ids"], self)}
        features = whole.pop("features")
        if features is None:
            return [self.encode({**whole, "features": None})]
        plain = {**features, "mm_metadata": _each(features["mm_metadata"], b"".join)}
        tensors = plain.pop("kwargs_data")
        # What is last in a map is last in its form: the tensors come behind it, in place of the null.
        head = self.encode({**whole, "features": {**plain, "kwargs_data": None}})
        return [head] if tensors is None else _merged([head[:-1], *_tensors(tensors)])


JSON: Final[Encoding] = _Json()
MSGPACK: Final[Encoding] = _MsgPack()


def _ids(token_ids: Sequence[int], encoding: Encoding) -> Any:
    return encoding.long_list(token_ids) if len(token_ids) > _AT_ONCE else token_ids


def _parts(elements: Sequence[int] | Sequence[str]) -> Iterator[Sequence[int] | Sequence[str]]:
    for start in range(0, len(elements), _AT_ONCE):
        yield elements[start : start + _AT_ONCE]


def _each(items: Mapping[str, Sequence[Any]] | None, encode: Any) -> dict[str, list[Any]] | None:
    """Return what ``encode`` makes of each item that is there, by modality."""
    if items is None:
        return None
    return {name: [None if item is None else encode(item) for item in of_one] for name, of_one in items.items()}


def _base64(item: Sequence[Piece]) -> msgspec.Raw:
    """Return base64 as a string that is encoded already: a ``str`` would be searched for escapes."""
    return msgspec.Raw(b"".join((b'"', pybase64.b64encode(b"".join(item)), b'"')))


def _tensors(items: Mapping[str, Sequence[Sequence[Piece] | None]]) -> Iterator[Piece]:
    yield map_head(len(items))
    for modality, of_one in items.items():
        yield msgspec.msgpack.encode(modality)
        yield array_head(len(of_one))
        for item in of_one:
            if item is None:
                yield b"\xc0"
                continue
            yield bin_head(sum(map(len, item)))
            yield from item


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with those joined that are bytes and stand together: they are small."""
    merged: list[Piece] = []
    small: list[bytes] = []
    for piece in pieces:
        if isinstance(piece, bytes):
            small.append(piece)
            continue
        merged += (b"".join(small), piece)
        small.clear()
    return [*merged, b"".join(small)]
