"""The seam between the lanes and the model families.

A family turns the encoded bytes of one medium into an item in two steps, so that a lane can reserve memory of the exact
size before anything is decoded where the family allows it:

1. :meth:`Family.open` reads the header, checks limits and answers with the plan and the fields' shapes;
2. :meth:`Prepared.fill` decodes, processes and writes the tensors into arrays that lie in the granted extent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from mmprep.card import ItemOptions, ModelCard
from mmprep.items import ItemMeta, Plan

if TYPE_CHECKING:
    from numpy.typing import NDArray  # the writer knows families by their limits alone, and has no numpy


class MediaLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one medium may be at most before it is decoded; whatever is above is refused as too large.

    Attributes
    ----------
    image_pixels: of a picture, and of a frame of a video, ``--max-image-pixels``.
    video_frames: of a video that are processed, ``--max-video-frames``.
    video_seconds: duration of a video, ``--max-video-duration``.
    audio_seconds: duration of a recording, ``--max-audio-duration``.
    """

    image_pixels: int
    video_frames: int
    video_seconds: float
    audio_seconds: float


class Prepared(Protocol):
    """One medium, opened: its metadata is known, its tensors are not computed yet.

    Attributes
    ----------
    meta: of the item.
    decode_ns: nanoseconds that reading and decoding the medium has taken so far, in opening and in filling.
    """

    meta: ItemMeta
    decode_ns: int

    def fill(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Decode and process the medium into ``tensors``.

        Parameters
        ----------
        tensors:
            A writable, C-contiguous array for each of ``meta.fields``, of its shape and storage dtype
            (:func:`mmprep.items.storage_dtype`), with undefined content.

        Raises
        ------
        mmprep.errors.MediaError
            The medium is broken.
        """


class Family(Protocol):
    """A model family, configured from one model directory."""

    card: ModelCard

    def plan(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Plan:
        """Return the plan of one medium; cheaper than :meth:`open` where the family allows it."""

    def check_injected(self, modality: str, plan: Plan, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Refuse an item that was processed elsewhere and does not hang together.

        Parameters
        ----------
        modality:
            One of ``card.fields``.
        plan:
            Its expansion; the ids that take an embedding are the placeholder's, and no others are.
        tensors:
            A read-only array for each field, of a shape and dtype that the card names; floats are finite.

        Raises
        ------
        mmprep.errors.InvalidRequest
            ``param`` names the field, or ``expansion``.
        """

    def open(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Prepared:
        """Read the header of one medium and decide its plan and shapes.

        Parameters
        ----------
        modality:
            One that the card names.
        medium:
            The encoded bytes, as a file holds them. The result may keep a reference.
        options:
            What the request chose.

        Raises
        ------
        mmprep.errors.UnsupportedMedia
            Not a kind of medium that is read.
        mmprep.errors.DecodeError
            Of a known kind, and broken.
        mmprep.errors.TooLarge
            Above one of the limits.
        """
