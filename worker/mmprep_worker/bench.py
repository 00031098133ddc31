"""``python -m mmprep_worker.bench``: the kernel against transformers' PIL backend, in one process, turn by turn.

Both process the same pictures with the same configuration. Ours writes into an array that exists, as into the ring; the
reference returns arrays of its own. uint8 is compared with the reference's float32: that is what an engine would run in
its place. What comes out is compared to the bit.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmprep import tensors
from mmprep.bench import pictures
from mmprep.bench.figures import median
from mmprep.bench.running import full_size_model
from mmprep.card import ItemOptions
from mmprep.items import field_array, region_size
from mmprep.without_torch import leave_torch_out
from mmprep_worker.images.patches import write_patches
from mmprep_worker.images.resample import NumbaResampler
from mmprep_worker.models.family import MediaLimits, Prepared
from mmprep_worker.models.qwen2_vl import Qwen2VLFamily
from mmprep_worker.models.registry import load_family

_SIZES = (pictures.VGA, pictures.HD, pictures.FULL_HD)
_REPEATS = 15
_LIMITS = MediaLimits(image_pixels=178_956_970, video_frames=768, video_seconds=3600.0, audio_seconds=3600.0)

Step = Callable[[], Any]


class Sides:
    """Both sides, for one picture and dtype.

    Parameters
    ----------
    family, reference:
        Of the same configuration.
    data:
        The picture, encoded.
    """

    def __init__(self, family: Qwen2VLFamily, reference: Any, data: bytes, dtype: str) -> None:
        self._family = family
        self._reference = reference
        self._data = data
        self._options = ItemOptions(dtype)
        self._meta = self._open().meta
        region = memoryview(bytearray(region_size(self._meta.fields)))
        self.out = {spec.name: field_array(region, spec) for spec in self._meta.fields}
        self._pixels = np.asarray(self._picture())

    def steps(self) -> dict[str, tuple[Step, Step]]:
        """Return ours and theirs by what they start from."""
        decoded = self._picture()
        return {
            "bytes": (
                lambda: self._open().fill(self.out),
                lambda: self._reference(images=self._picture(), return_tensors="np"),
            ),
            "pixels": (self._ours_decoded, lambda: self._reference(images=decoded, return_tensors="np")),
        }

    def check(self) -> None:
        """Raise AssertionError where the sides' results differ in a bit."""
        self._open().fill(self.out)
        found = dict(self.out)
        if self._options.dtype == "uint8":
            found = tensors.normalized(self._meta, found)
        expected = self._reference(images=self._picture(), return_tensors="np")
        _assert_equal(found["pixel_values"], expected["pixel_values"])
        _assert_equal(found["image_grid_thw"], expected["image_grid_thw"][0])
        before = self.out["pixel_values"].copy()
        self._ours_decoded()
        _assert_equal(self.out["pixel_values"], before)

    def _open(self) -> Prepared:
        return self._family.open("image", self._data, self._options)

    def _picture(self) -> Image.Image:
        return Image.open(io.BytesIO(self._data)).convert("RGB")

    def _ours_decoded(self) -> None:
        settings = self._family.settings
        _, down, across = self.out["image_grid_thw"].tolist()
        write_patches(
            self._family.resampler,
            self._pixels,
            (down, across),
            merge=settings.merge,
            out=self.out["pixel_values"].reshape(-1, 3, settings.times, settings.patch, settings.patch),
            tables=self._family.tables[self._options.dtype],
        )


def _assert_equal(ours: NDArray[Any], theirs: NDArray[Any]) -> None:
    if ours.dtype != theirs.dtype or not np.array_equal(ours, theirs):
        raise AssertionError("the kernel's result is not the reference's, to the bit")


def compare(ours: Step, theirs: Step, repeats: int) -> dict[str, Any]:
    """Return the medians of both, and of the ratio of neighbours, which what else the machine does meets alike.

    ``cpu_ratio`` is of CPU time, and ``user_ratio`` of CPU time outside of the kernel: without what the reference pays
    for the fresh pages of the arrays that it returns.
    """
    times: list[tuple[_Times, _Times]] = []
    for _ in range(repeats + 1):
        started = _Times.now()
        ours()
        between = _Times.now()
        theirs()
        times.append((between.since(started), _Times.now().since(between)))
    del times[0]
    return {
        "ours_ms": round(1000 * median([a.wall for a, _ in times]), 3),
        "theirs_ms": round(1000 * median([b.wall for _, b in times]), 3),
        "ratio": round(median([a.wall / b.wall for a, b in times]), 3),
        "cpu_ratio": round(median([a.cpu / b.cpu for a, b in times]), 3),
        "user_ratio": round(sum(a.user for a, _ in times) / max(1e-9, sum(b.user for _, b in times)), 3),
    }


class _Times(NamedTuple):
    """The clocks of this process, in seconds."""

    wall: float
    cpu: float
    user: float

    @classmethod
    def now(cls) -> Self:
        return cls(time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_utime)

    def since(self, earlier: Self) -> Self:
        return type(self)(self.wall - earlier.wall, self.cpu - earlier.cpu, self.user - earlier.user)


def measure(model: Path, sizes: tuple[pictures.Size, ...], repeats: int) -> dict[str, Any]:
    """Return the comparison for every size, dtype and start."""
    from transformers import Qwen2VLImageProcessorPil  # noqa: PLC0415 -- slow to import; the rest of this module is not

    family = load_family(model, _LIMITS)
    assert isinstance(family, Qwen2VLFamily)
    reference = Qwen2VLImageProcessorPil.from_pretrained(str(model))
    runs = []
    for size in sizes:
        data = pictures.jpeg(size)
        for dtype in ("float32", "uint8"):
            sides = Sides(family, reference, data, dtype)
            sides.check()
            for source, (ours, theirs) in sides.steps().items():
                runs.append({"size": size.name, "dtype": dtype, "source": source, **compare(ours, theirs, repeats)})
    return {
        "runs": runs,
        "repeats": repeats,
        "equal_to_the_bit": True,
        "compiled": isinstance(family.resampler, NumbaResampler),
    }


def main() -> None:
    """Do what the module's first line says."""
    leave_torch_out()
    parser = argparse.ArgumentParser(prog="mmprep_worker.bench", description="Measure the kernel; writes JSON.")
    parser.add_argument("--output", type=Path, help="file; default: standard output")
    parser.add_argument("--quick", action="store_true", help="one size, few repeats")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmprep-bench-") as directory:
        model = full_size_model(Path(directory) / "model")
        measured = measure(model, _SIZES[:1], 3) if parsed.quick else measure(model, _SIZES, _REPEATS)
    text = json.dumps(measured, indent=1) + "\n"
    if parsed.output is None:
        sys.stdout.write(text)
    else:
        parsed.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
