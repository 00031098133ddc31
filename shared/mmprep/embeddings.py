"""Media that somebody else has embedded already: their files are read, checked, and laid out as items. Pure.

They come as the bytes of a ``.npy`` file. That is a header of plain text and the numbers; nothing in it is executed. Pickled
tensors, which ``torch.save`` writes, are not read: unpickling runs what its sender likes.

A frontend reads a file to know its range and its key. Where the tensors are to lie in shared memory, the file itself is what
it offers, as any other medium, and a lane reads it again. So the digest in an item's key is that of the bytes that the lane
has checked, and neither process believes a length that it has not compared with what is there.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from mmprep.card import Embeds, Grid
from mmprep.errors import InvalidRequest
from mmprep.items import ItemMeta, Plan, Run, lay_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"\x93NUMPY"
#: By the version: bytes of the header's length.
_LENGTHS = {b"\x01\x00": 2, b"\x02\x00": 4}
#: Of plain numbers numpy writes some 120 bytes. What is longer takes long to read, and event loops read it.
_LONGEST_HEADER = 512
_DTYPES = {"<f4": "float32", "<f2": "float16"}
_WHOLE = ("<i8", "<i4", "<u8", "<u4")
_AXES = 3


class Embeddings(NamedTuple):
    """One medium's embeddings: what they are as an item, and its tensors by field, over the bytes of the file."""

    meta: ItemMeta
    arrays: Mapping[str, NDArray[Any]]


def read_embeddings(
    modality: str, data: bytes | memoryview, grid: Grid, how: Embeds, *, token_id: int, param: str | None = None
) -> Embeddings:
    """Return the item of one embedded medium; nothing is copied.

    Parameters
    ----------
    modality: of the medium.
    data: the ``.npy`` file of the embeddings, float32 or float16, of shape (rows, ``how.width``).
    grid: time, height and width in patches, each at least 1.
    how: of the card.
    token_id: of the placeholder.
    param: the place in the request, for errors.

    Raises
    ------
    InvalidRequest
        It is no such file, or contradicts the grid.
    """
    rows = read_npy(data, param)
    if rows.ndim == _AXES and rows.shape[0] == 1:
        rows = rows[0]
    dtype = _DTYPES.get(rows.dtype.str)
    if dtype is None:
        raise InvalidRequest("The embeddings must be float32 or float16, little-endian.", param=param)
    count = math.prod(grid) // how.merge**2
    if rows.shape != (count, how.width) or math.prod(grid) % how.merge**2:
        raise InvalidRequest(
            f"The embeddings are of shape {rows.shape}; with '{how.grid}' of {list(grid)} this model takes "
            f"({math.prod(grid) / how.merge**2:g}, {how.width}).",
            param=param,
        )
    specs = lay_out([(how.field, dtype, rows.shape, "flat", False), (how.grid, "int64", (_AXES,), "batched", True)])
    sides = np.array(grid, "<i8")
    meta = ItemMeta(modality, Plan((Run(token_id, count),)), specs, {how.grid: sides.tobytes()})
    return Embeddings(meta, {how.field: rows, how.grid: sides})


def read_npy(data: bytes | memoryview, param: str | None) -> NDArray[Any]:
    """Return the array in a ``.npy`` file, over its bytes.

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


def _header(text: bytes, param: str | None) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
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


def _broken(param: str | None) -> NoReturn:
    raise InvalidRequest("The .npy file is broken: its header does not say what follows it.", param=param)
