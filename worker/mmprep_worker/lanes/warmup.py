"""What a lane does once before it takes work, so that the first request is not slower than the next.

Every modality and dtype of the model is processed once, from encoded bytes to tensors on the heap: codecs are loaded,
kernels compiled, tables computed. The ring, the counters and the caches see nothing of it.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
from PIL import Image

from mmprep.card import ItemOptions
from mmprep.errors import TooLarge
from mmprep.items import field_array, region_size
from mmprep_worker.models.family import Family
from mmprep_worker.video.samples import videos


def _sample(width: int, height: int, kind: str) -> bytes:
    ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * np.array([1, 2, 3])
    buffer = io.BytesIO()
    Image.fromarray((ramp % 256).astype(np.uint8), "RGB").save(buffer, kind)
    return buffer.getvalue()


def _media(modality: str) -> list[bytes]:
    """Return small media of a modality, encoded."""
    if modality == "image":
        return [_sample(320, 240, "JPEG"), _sample(61, 97, "PNG"), _sample(97, 61, "WEBP")]
    if modality == "audio":
        from mmprep_worker.audio.samples import recordings  # noqa: PLC0415, only models that take sound need its codecs

        return recordings()
    if modality == "video":
        return videos()
    return []


def warm_up(family: Family) -> None:
    """Process small media in every way that requests can ask for; raises what the family raises.

    Media above the limits of the service are left out.
    """
    for placeholder in family.card.placeholders:
        for medium in _media(placeholder.modality):
            for dtype in family.card.dtypes[placeholder.modality]:
                with contextlib.suppress(TooLarge):
                    _process(family, placeholder.modality, medium, ItemOptions(dtype))


def _process(family: Family, modality: str, medium: bytes, options: ItemOptions) -> None:
    family.plan(modality, medium, options)
    prepared = family.open(modality, medium, options)
    region = memoryview(bytearray(region_size(prepared.meta.fields)))
    prepared.fill({spec.name: field_array(region, spec) for spec in prepared.meta.fields})
