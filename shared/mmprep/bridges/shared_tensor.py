"""A torch tensor on memory that is lent: nobody writes through it, and nobody reads through it when the loan is over.

torch has no read-only tensors, and takes every pointer for good. So a :class:`SharedTensor` has no memory of its own: it is
a shell around a plain tensor on the shared memory, and torch hands every operation on it to :meth:`SharedTensor.__torch_dispatch__`.

- An operation that writes into it, or into a view of it, is refused, by what torch's own schema says of its arguments.
- The loan is checked before each operation and again after it: what comes out was computed from the item's bytes, or is an
  error. The mapping itself stays for as long as a tensor on it lives.
- What is a view of the memory comes out as such a tensor again, under the same loan; everything else is a plain tensor.

WARNING: what asks for a pointer instead of an operation (NumPy, DLPack, a kernel of one's own, ``torch.compile``) gets an
error, never the pointer: it could not be taken back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray

from mmprep.errors import InvalidRequest, LeaseLost

_READ_ONLY = "the tensor lies in memory that others read, so nothing writes into it; write into its clone()"
_NO_POINTER = (
    "the tensor's memory is only lent, so its pointer is not given away; use its clone(), or item.view() for NumPy"
)


class Block:
    """A ``with`` block that lends tensors."""

    def __init__(self) -> None:
        self.over = False


class Loan:
    """Whether the memory of one item can be read.

    Parameters
    ----------
    block:
        In which it is lent.
    check:
        Raises where the item can't be read any more, as :meth:`mmprep.item.Source.check`.
    """

    __slots__ = ("_block", "_check")

    def __init__(self, block: Block, check: Callable[[], None]) -> None:
        self._block = block
        self._check = check

    def check(self) -> None:
        """Raise LeaseLost where the block or the lease is over, InvalidRequest where the client is closed."""
        if self._block.over:
            raise LeaseLost("the tensor's block is over; a clone() that is made inside the block stays good")
        self._check()


class SharedTensor(torch.Tensor):  # type: ignore[misc]  # torch's types are not read
    """A read-only tensor on lent memory; see the module. Made by :func:`lend`."""

    _plain: torch.Tensor
    _loan: Loan

    def __new__(cls, plain: torch.Tensor, loan: Loan) -> Self:
        shell: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 -- the documented way to make a shell
            cls,
            plain.size(),
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=plain.device,
        )
        # Code below Python that asks the shell for a pointer gets an exception, and not the null that crashes it.
        torch._C._set_throw_on_mutable_data_ptr(shell)  # noqa: SLF001 -- what torch's own shells use
        shell._plain, shell._loan = plain, loan
        return shell

    __torch_function__ = torch._C._disabled_torch_function_impl  # noqa: SLF001 -- as torch documents it

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do one operation of torch on the memory, if it only reads it and the loan holds."""
        named = dict(kwargs or {})
        _refuse_writing(func, args, named)
        shells: list[SharedTensor] = []
        plain_args, plain_named = _plain(args, shells), _plain(named, shells)
        for shell in shells:
            shell._loan.check()  # noqa: SLF001 -- of this class
        found = func(*plain_args, **plain_named)
        for shell in shells:
            shell._loan.check()  # noqa: SLF001
        return _lent_again(found, {_start(shell._plain): shell._loan for shell in shells})  # noqa: SLF001

    # --- what does not come as an operation -------------------------------------------------------------------------

    def __repr__(self, **_: Any) -> str:
        return f"SharedTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    def tolist(self) -> Any:
        return self.clone().tolist()

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    def _refuse_pointer(self, *_: Any, **__: Any) -> NoReturn:
        raise InvalidRequest(_NO_POINTER)

    def _refuse_write(self, *_: Any, **__: Any) -> NoReturn:
        raise InvalidRequest(_READ_ONLY)

    numpy = __array__ = __dlpack__ = data_ptr = _refuse_pointer
    untyped_storage = storage = share_memory_ = _refuse_pointer
    apply_ = map_ = map2_ = _refuse_write
    data = property(torch.Tensor.detach, _refuse_write)


class Memory:
    """The memory of a read-only array as torch takes it, for ``np.asarray``: torch warns of what it cannot write to.

    Parameters
    ----------
    keeper:
        Lives for as long as an array or a tensor on the memory does.
    """

    def __init__(self, array: NDArray[Any], keeper: Any = None) -> None:
        self._held = (array, keeper)
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def lend(array: NDArray[Any], dtype: str, loan: Loan) -> SharedTensor:
    """Return a tensor on the memory of ``array``, without a copy.

    Parameters
    ----------
    array:
        As :meth:`mmprep.item.Item.view` gives it; the tensor keeps its memory mapped.
    dtype:
        One of :data:`mmprep.items.DTYPE_SIZES`; ``bfloat16`` reads the array's uint16 as what they stand for.
    loan:
        For how long it can be read.
    """
    return SharedTensor(typed(np.asarray(Memory(array)), dtype), loan)


def typed(array: NDArray[Any], dtype: str) -> torch.Tensor:
    """Return a plain tensor on the memory of ``array``, which must be writable; ``dtype`` as in :func:`lend`."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that an operation writes to, or that come to lie on another's memory."""
    arguments = func._schema.arguments  # noqa: SLF001 -- torch has no other word about it
    if func.overloadpacket is torch.ops.aten.set_:
        return tuple((place, argument.name) for place, argument in enumerate(arguments))
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _refuse_writing(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> None:
    for place, name in _written(func):
        given = args[place] if place < len(args) else named.get(name)
        if any(isinstance(one, SharedTensor) for one in (given if isinstance(given, list | tuple) else [given])):
            raise InvalidRequest(_READ_ONLY)


def _plain(given: Any, shells: list[SharedTensor]) -> Any:
    """Return ``given`` with the tensors inside the shells, and note the shells."""
    if isinstance(given, SharedTensor):
        shells.append(given)
        return given._plain  # noqa: SLF001
    if isinstance(given, list | tuple):
        return type(given)(_plain(one, shells) for one in given)
    if isinstance(given, dict):
        return {name: _plain(one, shells) for name, one in given.items()}
    return given


def _start(tensor: torch.Tensor) -> int:
    """Return where the memory begins that ``tensor`` lies on; the same for all views of it."""
    start: int = tensor.untyped_storage().data_ptr()
    return start


def _lent_again(found: Any, lent: Mapping[int, Loan]) -> Any:
    """Return what an operation gave, with shells around what lies on lent memory."""
    if isinstance(found, torch.Tensor) and found.layout is torch.strided:
        loan = lent.get(_start(found))
        return found if loan is None else SharedTensor(found, loan)
    if isinstance(found, list | tuple):
        return type(found)(_lent_again(one, lent) for one in found)
    return found
