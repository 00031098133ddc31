"""What a lane does once before it takes work, so that the first request is not slower than the next.

Every modality that requests may have is processed in every dtype, from encoded bytes to tensors on the heap, and planned
alone: codecs are loaded, kernels compiled, tables computed. The ring, the counters and the caches see nothing of it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator

import numpy as np
from PIL import Image

from mmprep.card import ItemOptions
from mmprep.digest import Hasher
from mmprep.errors import MediaError, TooLarge
from mmprep.items import ItemMeta, field_array, region_size
from mmprep.wire.codec import pack, unpack
from mmprep_worker.models.family import Family
from mmprep_worker.video.samples import videos


class ColdError(Exception):
    """The warm-up has failed; the message says with what, and holds no path."""


def _sample(width: int, height: int, kind: str) -> bytes:
    ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * np.array([1, 2, 3])
    buffer = io.BytesIO()
    Image.fromarray((ramp % 256).astype(np.uint8), "RGB").save(buffer, kind)
    return buffer.getvalue()


def _media(modality: str) -> list[bytes]:
    """Return small media of a modality, encoded."""
    if modality == "image":
        return [_sample(640, 480, "JPEG"), _sample(61, 97, "PNG"), _sample(97, 61, "WEBP")]
    if modality == "audio":
        from mmprep_worker.audio.samples import recordings  # noqa: PLC0415, only models that take sound need its codecs

        return recordings()
    if modality == "video":
        return videos()
    return []


def warm_up(family: Family, modalities: Collection[str]) -> None:
    """Process small media in every way that requests can ask for.

    Media above the limits of the service are left out.

    Parameters
    ----------
    modalities:
        That requests may have; those of them that the family takes are warmed.

    Raises
    ------
    ColdError
        One of them could not be processed.
    """
    for placeholder in family.card.placeholders:
        modality = placeholder.modality
        if modality in modalities:
            dtypes = family.card.dtypes[modality]
            with _naming(f"a small {modality}"):
                media = _media(modality)
            for medium in media:
                for dtype in dtypes:
                    with _naming(f"a small {modality} in {dtype}"), contextlib.suppress(TooLarge):
                        _process(family, modality, medium, ItemOptions(dtype))


def _process(family: Family, modality: str, medium: bytes, chosen: ItemOptions) -> None:
    Hasher().content_digest(medium)
    options = unpack(pack(chosen), ItemOptions)
    ItemMeta(modality, family.plan(modality, medium, options), (), {}).pack()
    prepared = family.open(modality, medium, options)
    prepared.meta.pack()
    region = memoryview(bytearray(region_size(prepared.meta.fields)))
    prepared.fill({spec.name: field_array(region, spec) for spec in prepared.meta.fields})


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say of an error what was tried. What the code or a library said may hold a path, and is for the log."""
    try:
        yield
    except TooLarge:
        raise
    except Exception as error:
        why = str(error) if isinstance(error, MediaError) else type(error).__name__
        raise ColdError(f"a lane cannot be warmed up with {what}: {why}") from error
