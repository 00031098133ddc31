"""A real service that breaks where a test says: failpoints behind gates, pictures with known tensors, and what must be whole after.

A gate is a file. While it is there, its failpoint sleeps. :meth:`Gates.open` removes it, and the process that reaches the
point first makes it anew and breaks: so one service is led through all its points, one at a time.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tests.integration.service import Service, _is_quiet, eventually, serving, user

from mmprep import embedded
from mmprep.card import ItemOptions
from mmprep.cli.desk import DeskClient
from mmprep.failpoints import VARIABLE
from mmprep.items import field_array, region_size
from mmprep.runtime import RuntimeDir
from mmprep.segment import segments_of
from mmprep_worker.models.family import MediaLimits
from mmprep_worker.models.registry import load_family


class Gates:
    """The gates of one service's failpoints, by label."""

    def __init__(self, directory: Path, entries: Mapping[str, str]) -> None:
        self._directory = directory
        for label in entries:
            self._path(label).touch()
        armed = (entry.partition("=") for entry in entries.values())
        self.variable = ";".join(
            f"{point}=once:{self._path(label)},{action}"
            for label, (point, _, action) in zip(entries, armed, strict=True)
        )

    def _path(self, label: str) -> Path:
        return self._directory / label.replace(" ", "-")

    def open(self, label: str) -> None:
        self._path(label).unlink()

    def was_taken(self, label: str) -> bool:
        return self._path(label).exists()

    def wait(self, label: str) -> None:
        eventually(lambda: self.was_taken(label), f"a process at {label}")


class Faulty:
    """A running service, its gates, and a desk that tells its status without a process for each question."""

    def __init__(self, service: Service, gates: Gates, desk: DeskClient) -> None:
        self.service = service
        self.gates = gates
        self._desk = desk

    def status(self):
        return self._desk.status()

    def status_when(self, condition, what):
        return eventually(lambda: (status := self.status()) and condition(status) and status, what)

    def pids(self, role):
        """Return the pids of ``writer``, ``frontend`` or ``lane`` processes, all of them warm."""
        status = self.status_when(_is_whole, "a whole service")
        if role == "writer":
            return {status["worker"]["pid"]}
        return {process["pid"] for process in status[f"{role}s"]}

    def whole(self):
        """Wait until every process is there and nothing is under way or held; check that memory adds up."""
        status = self.status_when(lambda s: _is_whole(s) and _is_quiet(s), "a whole service with nothing under way")
        ring = status["ring"]
        assert ring["leased"] == ring["filling"] == status["pins"] == 0
        assert ring["free"] + ring["ready"] + ring["leased"] + ring["filling"] == ring["capacity"]
        assert not any(queue["depth"] or queue["bytes"] for queue in status["queues"].values())
        assert len(self.segments()) == 1 + status["spills"]["entries"], "a segment is left over, or one is missing"
        return status

    def segments(self):
        """Return the names of all segments of the service."""
        return segments_of(RuntimeDir(self.service.runtime_dir).runtime_id)


def _is_whole(status) -> bool:
    return bool(
        len(status["frontends"]) == 2
        and all(frontend["ready"] for frontend in status["frontends"])
        and len(status.get("lanes", ())) == 2
        and all(lane["pid"] and lane["state"] != "starting" for lane in status["lanes"])
    )


@contextmanager
def faulty(entries: Mapping[str, str], *options) -> Iterator[Faulty]:
    """Give a ready service with these failpoints, each ``label: "point=action"``, all of them asleep."""
    directory = Path(tempfile.mkdtemp(prefix="mmprep-gates-", dir="/tmp"))
    gates = Gates(directory, entries)
    try:
        with (
            serving("--frontends", 2, "--lanes", 2, *options, env={VARIABLE: gates.variable}) as service,
            DeskClient(str(service.runtime_dir)) as desk,
        ):
            yield Faulty(service, gates, desk)
    finally:
        shutil.rmtree(directory)


# --- pictures ---------------------------------------------------------------------------------------------------------


@cache
def drawn(number: int, side: int = 100) -> bytes:
    """Return a picture of its own as a PNG."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, "PNG", compress_level=0)
    return into.getvalue()


@cache
def _family():
    return load_family(embedded.path(), MediaLimits(1 << 27, 64, 60.0, 60.0))


def expected(picture: bytes) -> np.ndarray:
    """Return the pixel values of a picture, computed in this process."""
    prepared = _family().open("image", picture, ItemOptions("uint8"))
    region = memoryview(bytearray(region_size(prepared.meta.fields)))
    arrays = {spec.name: field_array(region, spec) for spec in prepared.meta.fields}
    prepared.fill(arrays)
    return arrays["pixel_values"]


def asked(picture: bytes):
    """Return the messages of a native request about one picture."""
    return user({"type": "image_url", "image_url": picture})


def is_right(result, picture: bytes) -> bool:
    """Whether a native client's answer has the tensors of the picture; lets go of it."""
    (item,) = result.items["image"]
    right = np.array_equal(item.materialize()["pixel_values"], expected(picture))
    result.release()
    return right
