"""Pictures that somebody else has embedded already: read, checked, and laid out as an item.

They come as the bytes of a ``.npy`` file, in base64. That is a header of plain text and the numbers; nothing in it is
executed. Pickled tensors, which ``torch.save`` writes, are not read: unpickling runs what its sender likes.

The range in the prompt is as long as the embeddings have rows. They are never kept in the cache, since there is nothing
to compute again.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec
import numpy as np
import pybase64
from numpy.typing import NDArray

from mmprep.card import Embeds
from mmprep.errors import InvalidRequest
from mmprep.items import ItemMeta, Plan, Run, lay_out, region_size

_MAGIC = b"\x93NUMPY"
#: By the version: bytes of the header's length.
_LENGTHS = {b"\x01\x00": 2, b"\x02\x00": 4}
_LONGEST_HEADER = 10_000
_DTYPES = {"<f4": "float32", "<f2": "float16"}
_WHOLE = ("<i8", "<i4", "<u8", "<u4")
_AXES = 3
_LARGEST_GRID = 1 << 20


@dataclass(frozen=True)
class EmbeddedItem:
    """One item, ready to be sent: its metadata, and its tensors as they are laid out."""

    meta: ItemMeta
    region: memoryview


def embedded_item(
    modality: str, data: bytes | memoryview, grid: str | Sequence[int], how: Embeds, *, token_id: int, param: str
) -> EmbeddedItem:
    """Return the item of one embedded medium.

    Parameters
    ----------
    modality: of the medium.
    data: the ``.npy`` file of the embeddings, float32 or float16, of shape (rows, ``how.width``).
    grid: three numbers, or the ``.npy`` file of them in base64.
    how: of the card.
    token_id: of the placeholder.
    param: the place in the request.

    Raises
    ------
    InvalidRequest
        They are no such arrays, or contradict each other.
    """
    rows = read_npy(data, param)
    if rows.ndim == _AXES and rows.shape[0] == 1:
        rows = rows[0]
    dtype = _DTYPES.get(rows.dtype.str)
    if dtype is None:
        raise InvalidRequest("The embeddings must be float32 or float16, little-endian.", param=param)
    sides = _sides(grid, f"{param}.{how.grid}")
    count = math.prod(sides) // how.merge**2
    if rows.shape != (count, how.width) or math.prod(sides) % how.merge**2:
        raise InvalidRequest(
            f"The embeddings are of shape {rows.shape}; with '{how.grid}' of {list(sides)} this model takes "
            f"({math.prod(sides) / how.merge**2:g}, {how.width}).",
            param=param,
        )
    specs = lay_out([(how.field, dtype, rows.shape, "flat", False), (how.grid, "int64", (_AXES,), "batched", True)])
    told = np.array(sides, "<i8").tobytes()
    region = bytearray(region_size(specs))
    for spec, raw in zip(specs, (rows.tobytes(), told), strict=True):
        region[spec.offset : spec.offset + spec.nbytes] = raw
    meta = ItemMeta(modality, Plan((Run(token_id, count),)), specs, {how.grid: told})
    return EmbeddedItem(meta, memoryview(region))


def read_npy(data: bytes | memoryview, param: str) -> NDArray[Any]:
    """Return the array in a ``.npy`` file, over its bytes where it lies in C's order.

    Nothing is allocated that the header alone asks for. The format is numpy's, versions 1 and 2.

    Raises
    ------
    InvalidRequest
        It is no such file, or holds anything but numbers.
    """
    view = memoryview(data)
    size = _LENGTHS.get(bytes(view[6:8]))
    if bytes(view[:6]) != _MAGIC or size is None:
        raise InvalidRequest(
            "This is no .npy file: send the bytes of one in base64 (numpy.save). Tensors that torch.save wrote are not "
            "read, since they are pickled.",
            param=param,
        )
    start = 8 + size
    end = start + int.from_bytes(view[8:start], "little")
    if end - start > _LONGEST_HEADER or end > len(view):
        _broken(param)
    dtype, fortran, shape = _header(bytes(view[start:end]), param)
    body = view[end:]
    if len(body) != math.prod(shape) * dtype.itemsize:
        _broken(param)
    array: NDArray[Any] = np.frombuffer(body, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _header(text: bytes, param: str) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    try:
        header = ast.literal_eval(text.decode("latin-1"))
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        _broken(param)
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and 0 <= n <= 1 << 40 for n in shape):
        _broken(param)
    if descr not in (*_DTYPES, *_WHOLE) or not isinstance(fortran, bool):
        raise InvalidRequest("The .npy file must hold plain little-endian numbers.", param=param)
    return np.dtype(descr), fortran, shape


def _broken(param: str) -> NoReturn:
    raise InvalidRequest("The .npy file is broken: its header does not say what follows it.", param=param)


def _sides(grid: str | Sequence[int], param: str) -> tuple[int, int, int]:
    """Return time, height and width in patches."""
    if isinstance(grid, str):
        try:
            decoded = pybase64.b64decode(grid, validate=True)
        except ValueError:
            raise InvalidRequest("This is not valid base64.", param=param) from None
        grid = read_npy(decoded, param).reshape(-1).tolist()
    try:
        sides = msgspec.convert(list(grid), tuple[int, int, int])
    except msgspec.ValidationError:
        raise InvalidRequest(
            "The grid is three whole numbers: time, height and width in patches.", param=param
        ) from None
    if not all(0 < side <= _LARGEST_GRID for side in sides):
        raise InvalidRequest("Each side of the grid is at least one patch.", param=param)
    return sides
