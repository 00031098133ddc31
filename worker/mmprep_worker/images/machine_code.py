"""Machine code of the loops: compiled by numba once, kept in this user's cache, and loaded by LLVM alone.

numba takes two thirds of a lane's start to import and to set up its compiler, and tens of megabytes; to load what it has compiled takes
neither. Of processes that start together one compiles a loop, and the others wait for it and load it.

A loop's code is good for the processor, the packages and the source that it was made of; all of these are in its key.
Where code cannot be loaded without numba, it is compiled at every start: that takes seconds, and is said in the log.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import platform
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import msgspec

from mmprep.kept import KeptFiles, cache_directory

#: Loops that are kept; each has some tens of kilobytes.
_MOST = 64
_log = logging.getLogger(__name__)
#: What numba has compiled in this process and must stay.
_live: list[Any] = []


class _Code(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One loop, as an object file.

    Attributes
    ----------
    symbol: under which it is found.
    absent: symbols of numba's own that it names beside.
    """

    symbol: str
    absent: tuple[str, ...]
    object: bytes


def address(loop: str, *constants: Any) -> int:
    """Return the address of a loop, from the cache or compiled.

    Parameters
    ----------
    loop:
        A function of :mod:`mmprep_worker.images.loops` that compiles it.
    constants:
        Its arguments.

    Raises
    ------
    ImportError
        It has to be compiled, and numba is not there.
    """
    files = _files()
    key = _key(loop, constants)
    if (found := _kept(files, key)) is not None:
        return found
    with files.alone():
        if (found := _kept(files, key)) is not None:
            return found
        return _compile(files, key, loop, constants)


@functools.cache
def _files() -> KeptFiles:
    home = cache_directory()
    return KeptFiles(home and home / "loops", _MOST)


def _key(loop: str, constants: tuple[Any, ...]) -> bytes:
    source = Path(__file__).with_name("loops.py").read_bytes()
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    processor = [platform.machine(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    told = msgspec.json.encode([loop, constants, versions, sys.version, processor])
    return hashlib.sha256(hashlib.sha256(source).digest() + told).digest()


def _kept(files: KeptFiles, key: bytes) -> int | None:
    data = files.get(key)
    if data is None:
        return None
    try:
        return _load(msgspec.msgpack.decode(data, type=_Code), key)
    except (msgspec.DecodeError, RuntimeError):
        return None


def _compile(files: KeptFiles, key: bytes, loop: str, constants: tuple[Any, ...]) -> int:
    from mmprep_worker.images import loops  # noqa: PLC0415, brings numba

    compiled = getattr(loops, loop)(*constants)
    _live.append(compiled)
    try:
        code = _code_of(compiled)
        _load(code, key)
        files.put(key, msgspec.msgpack.encode(code))
    except (AttributeError, RuntimeError) as error:  # another numba or LLVM than those that are known
        _log.warning("the compiled kernel cannot be kept, and is compiled at every start: %s", error)
    found: int = compiled.address
    return found


def _code_of(compiled: Any) -> _Code:
    """Return the object file of what numba has compiled."""
    _target()
    module = llvm.parse_assembly(compiled.inspect_llvm())
    declared = [function.name for function in module.functions if function.is_declaration]
    own = tuple(name for name in declared if name.startswith(("NRT_", "numba_")))
    machine = _target().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="small",
    )
    return _Code(compiled.native_name, own, machine.emit_object(module))


@functools.cache
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


@functools.cache
def _linker() -> Any:
    _target()
    return llvm.create_lljit_compiler()


def _load(code: _Code, key: bytes) -> int:
    """Link the object file into this process and return the loop's address; raises RuntimeError where it does not fit."""
    # What names them is reached only where a loop raises, which none does.
    nowhere = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    library = llvm.JITLibraryBuilder().add_object_img(code.object).add_current_process()
    for name in code.absent:
        library.import_symbol(name, nowhere)
    linked = library.export_symbol(code.symbol).link(_linker(), key.hex())
    _live.append(linked)
    found: int = linked[code.symbol]
    return found
