"""``python -m mmprep.demo.backend``: the process in the role of an engine; a reader of the shared memory.

It takes one JSON object a line on standard input and answers each with one on standard output; the end of the input ends
it. The calls:

``{"do": "prepare", "model": DIRECTORY, "pictures": [FILE]}``
    Compute the reference: transformers' own processor of the model, on its own decoding of the files.
``{"do": "register", "endpoint": "ipc://…", "id": NAME}``
    Register with the service.
``{"do": "compare", "addresses": [ADDRESS]}``
    Read the items at addresses that are leased to us, and compare each with the reference of the picture in its place.
``{"do": "release"}``
    Give up all leases.

A call that fails is answered with ``{"error": TEXT}``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprep.backend import Backend
from mmprep.errors import MmprepError
from mmprep.item import Item
from mmprep.without_torch import leave_torch_out

Tensors = Mapping[str, NDArray[Any]]


class Reader:
    """What the process holds: its registration, its items, and the reference."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._items: list[Item] = []
        self._reference: list[Tensors] = []

    def answer(self, call: dict[str, Any]) -> dict[str, Any]:
        """Carry out one call and return its answer."""
        match call["do"]:
            case "prepare":
                processor, self._reference = reference(Path(call["model"]), [Path(name) for name in call["pictures"]])
                return {"processor": processor}
            case "register":
                self._backend = Backend(call["endpoint"], id=call["id"])
                return {"id": self._backend.id, "pid": os.getpid()}
            case "compare":
                return {
                    "items": [self._compare(*pair) for pair in zip(call["addresses"], self._reference, strict=True)]
                }
            case "release":
                return {"released": self._release()}
        raise ValueError(f"there is no call {call['do']!r}")

    def close(self) -> None:
        """Leave the service."""
        if self._backend is not None:
            self._backend.close()

    def _compare(self, address: dict[str, Any], expected: Tensors) -> dict[str, Any]:
        assert self._backend is not None, "not registered"
        item = self._backend.open(address)
        self._items.append(item)
        found = item.materialize(normalize=True)
        return {
            "fields": {name: [str(array.dtype), list(array.shape)] for name, array in found.items()},
            "grid": found["image_grid_thw"].tolist(),
            "differences": differences(found, expected),
        }

    def _release(self) -> int:
        for item in self._items:
            item.release()
        released, self._items = len(self._items), []
        return released


def reference(model: Path, pictures: Sequence[Path]) -> tuple[str, list[Tensors]]:
    """Return the class of transformers' processor of ``model``, and what it makes of each picture.

    Returns
    -------
    The class's name, and for each picture ``pixel_values``, float32, shape ``(patches, 1176)``, and ``image_grid_thw``,
    shape ``(3,)``.
    """
    from PIL import Image  # noqa: PLC0415 -- only with the server extra
    from transformers import AutoImageProcessor  # noqa: PLC0415 -- as above

    load: Any = AutoImageProcessor.from_pretrained
    processor = load(model)
    results: list[Tensors] = []
    for name in pictures:
        with Image.open(name) as picture:
            output = processor(picture.convert("RGB"), return_tensors="np")
        results.append({"pixel_values": output["pixel_values"], "image_grid_thw": output["image_grid_thw"][0]})
    return type(processor).__name__, results


def differences(found: Tensors, expected: Tensors) -> list[str]:
    """Return what differs between two sets of tensors, one sentence a field; none where they are equal to the bit.

    Parameters
    ----------
    found, expected:
        Arrays by field name. Integers may differ in width; floats may not.
    """
    if found.keys() != expected.keys():
        return [f"the fields are {', '.join(sorted(found))}, not {', '.join(sorted(expected))}"]
    wrong = []
    for name, reference_array in expected.items():
        array = found[name]
        if array.shape != reference_array.shape:
            wrong.append(f"{name} has the shape {array.shape}, not {reference_array.shape}")
        elif array.dtype.kind != reference_array.dtype.kind or (
            array.dtype.kind == "f" and array.dtype != reference_array.dtype
        ):
            wrong.append(f"{name} is {array.dtype}, not {reference_array.dtype}")
        elif not same_bits(array, reference_array):
            count = np.count_nonzero(array != reference_array)
            wrong.append(f"{name} differs in {count:,} of {array.size:,} values")
    return wrong


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays of one shape and kind hold the same bits (the same numbers, for integers)."""
    if one.dtype.kind == "f":
        return one.tobytes() == other.tobytes()
    return bool(np.array_equal(one, other))


def main() -> None:
    """Answer calls until standard input ends."""
    leave_torch_out()
    # Read at import: says in a line of its own that there is no torch, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    reader = Reader()
    try:
        for line in sys.stdin:
            try:
                answer = reader.answer(json.loads(line))
            except MmprepError as error:
                answer = {"error": error.message}
            except ImportError as error:
                answer = {"error": f"{error.name} is missing; install mmprep[server]"}
            sys.stdout.write(f"{json.dumps(answer)}\n")
            sys.stdout.flush()
    finally:
        reader.close()


if __name__ == "__main__":
    main()
