"""What one processed medium consists of: its plan, its fields, and how both are laid out.

An *item* is the processed form of one medium. Its tensors are named *fields*; its *plan* says which token ids replace
the placeholder and which of those positions take an embedding. Plans are small and are kept apart from the tensors.

An extent holds one item as ``[metadata][padding][field][padding][field]…``: the metadata is an :class:`ItemMeta` in
MessagePack, the fields start at the next multiple of :data:`ALIGNMENT` and each field at a multiple of it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgpack
import msgspec

from mmprep.schemas import prepare

if TYPE_CHECKING:
    # Only who has tensors needs it: half of what a writer or a command takes to start would be numpy.
    import numpy as np
    from numpy.typing import NDArray

#: Extents, and fields within an extent, start at multiples of this many bytes (a cache line).
ALIGNMENT = 64

#: Bytes an element. ``bfloat16`` has no numpy type: its bit patterns travel as uint16.
DTYPE_SIZES = {
    "uint8": 1,
    "bool": 1,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}

#: Bytes of packed metadata up to which they are kept unpacked.
_REMEMBERED = 4096

Natural = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
#: Of a directory's record; :mod:`mmprep.layout` has more about it.
Generation = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
FieldKind = Literal["batched", "flat", "shared"]


def align(nbytes: int) -> int:
    """Return ``nbytes`` rounded up to a multiple of :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def storage_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype that holds elements of dtype ``name``, little-endian; ``bfloat16`` gives uint16.

    Raises
    ------
    ValueError
        The name is none of :data:`DTYPE_SIZES`.
    """
    if name not in DTYPE_SIZES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPE_SIZES)}")
    import numpy as np  # noqa: PLC0415, as above

    return np.dtype("uint16" if name == "bfloat16" else name).newbyteorder("<")


class FieldSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor of an item.

    Attributes
    ----------
    name: the engine's keyword argument, as ``pixel_values``.
    dtype: one of :data:`DTYPE_SIZES`.
    shape: of this item's tensor. For a *batched* field without the batch dimension.
    kind: how engines join items: *batched* (stack), *flat* (concatenate along dimension 0), *shared* (one for all).
    keep_on_cpu: the engine does not move this field to the device.
    offset: bytes from the start of the extent's tensor region.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    dtype: str
    shape: Annotated[tuple[Natural, ...], msgspec.Meta(max_length=8)]
    kind: FieldKind
    keep_on_cpu: bool
    offset: Natural

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; raises ``ValueError`` where its dtype is none of :data:`DTYPE_SIZES`."""
        count = storage_dtype(self.dtype).itemsize
        for extent in self.shape:
            count *= extent
        return count


def lay_out(fields: Iterable[tuple[str, str, Sequence[int], FieldKind, bool]]) -> tuple[FieldSpec, ...]:
    """Return field specifications with offsets, one behind the other, each aligned.

    Parameters
    ----------
    fields:
        ``(name, dtype, shape, kind, keep_on_cpu)`` each.
    """
    specs = []
    offset = 0
    for name, dtype, shape, kind, keep_on_cpu in fields:
        spec = FieldSpec(name, dtype, tuple(int(n) for n in shape), kind, keep_on_cpu, offset)
        specs.append(spec)
        offset = align(offset + spec.nbytes)
    return tuple(specs)


def region_size(fields: Iterable[FieldSpec]) -> int:
    """Return the bytes from the start of the tensor region to the end of its last field."""
    return max((spec.offset + spec.nbytes for spec in fields), default=0)


class Run(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``count`` times the same token id; ``embed`` says whether these positions take an embedding."""

    token_id: Natural
    count: Natural
    embed: bool = True


class Plan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The token ids that replace one placeholder, run-length encoded."""

    runs: tuple[Run, ...]

    @property
    def length(self) -> int:
        """How many ids replace the placeholder."""
        return sum(run.count for run in self.runs)

    def token_ids(self) -> list[int]:
        """Return the ids, expanded."""
        return [run.token_id for run in self.runs for _ in range(run.count)]

    def is_embed(self) -> list[bool] | None:
        """Return the mask over the ids, or ``None`` where every position takes an embedding."""
        if all(run.embed for run in self.runs):
            return None
        return [run.embed for run in self.runs for _ in range(run.count)]


class Normalization(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What makes float pixels of uint8 ones: ``(pixel * scale - mean[c]) / std[c]``, as the reference computes it.

    ``field`` names the tensor it applies to; ``channels`` is the length of the run of elements of one channel in the
    last dimension (Qwen2-VL: 392 of 1176: two times a 14 by 14 patch), 0 where the channel is dimension 0.
    """

    field: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    run: Natural


class ItemMeta(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Everything about an item except its tensors' bytes; the writer treats it as opaque."""

    modality: str
    plan: Plan
    fields: tuple[FieldSpec, ...]
    #: Raw bytes of the fields that stay on the CPU: small, and needed where the tensors are not.
    cpu: dict[str, bytes]
    normalization: Normalization | None = None
    #: Digest of what was injected, for an item that was processed elsewhere.
    injected: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)] | None = None

    def pack(self) -> bytes:
        """Return the MessagePack form, at most a few kB."""
        packed: bytes = msgpack.packb(msgspec.to_builtins(self, builtin_types=(bytes,)))
        return packed


prepare(ItemMeta)


def unpack_meta(blob: bytes) -> ItemMeta:
    """Return the metadata that :meth:`ItemMeta.pack` wrote.

    Raises
    ------
    ValueError
        The bytes are no valid metadata.
    """
    # Pictures of one size have the same; videos with text between their frames have large ones of their own.
    return _remembered(blob) if len(blob) <= _REMEMBERED else _unpack(blob)


def _unpack(blob: bytes) -> ItemMeta:
    try:
        msgspec.msgpack.decode(blob, type=msgspec.Raw)  # for the reason in mmprep.wire.codec
        plain = msgpack.unpackb(blob, use_list=True, strict_map_key=True)
        meta = msgspec.convert(plain, ItemMeta, builtin_types=(bytes,))
        for spec in meta.fields:
            storage_dtype(spec.dtype)
    except (msgspec.DecodeError, msgpack.UnpackException, ValueError, RecursionError) as error:
        raise ValueError(f"not an item's metadata: {error}") from None
    return meta


_remembered = lru_cache(maxsize=512)(_unpack)


def field_array(region: memoryview, spec: FieldSpec) -> NDArray[Any]:
    """Return ``spec``'s tensor as an array over ``region``, the tensor region of an extent; nothing is copied."""
    import numpy as np  # noqa: PLC0415, as above

    dtype = storage_dtype(spec.dtype)
    return np.frombuffer(region[spec.offset : spec.offset + spec.nbytes], dtype=dtype).reshape(spec.shape)
