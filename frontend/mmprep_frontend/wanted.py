"""What the media of a request are to the writer: their keys and aliases, how they are read, what they cost. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from mmprep.card import Io, ItemOptions, ModelCard, pack_io
from mmprep.digest import HashName
from mmprep.errors import InvalidRequest, NotFound
from mmprep.items import ItemMeta
from mmprep.keys import encode_parts, item_key
from mmprep.wire.messages import HEAVY_COST, Alias, ItemAnswer, Recalled
from mmprep_frontend.media.intake import Medium
from mmprep_frontend.media.keys import alias, injected_hash, injected_key, variant
from mmprep_frontend.offered import OfferItem
from mmprep_frontend.render.conversation import MediaPart

#: What one medium is estimated to cost, in pixels: the least, and for each encoded byte where its pixels are not known. A
#: second of video is as much as a large picture, so every video is slow work.
_COST = {"image": (4096, 4), "video": (HEAVY_COST, 40), "audio": (65_536, 1)}


def wanted(
    part: MediaPart,
    medium: Medium | None,
    *,
    card: ModelCard,
    scope: bytes,
    hash_name: HashName,
    dtype: str,
    io: Mapping[str, Io],
    kwargs: Mapping[str, bytes],
    injected: bool = False,
) -> OfferItem | Recalled:
    """Return what the writer is asked for.

    Parameters
    ----------
    part:
        Of the request.
    medium:
        Its bytes; ``None`` where the part has only a uuid.
    card:
        Of the served model.
    scope:
        From :func:`mmprep_frontend.media.keys.scope`.
    hash_name:
        Which hash the media's digests are of.
    dtype:
        Of the main tensor, or ``auto``.
    io:
        How media are read, by modality.
    kwargs:
        How they are processed, by modality, from :func:`mmprep.arguments.choose`.
    injected:
        Whether items may have been injected.

    Raises
    ------
    InvalidRequest
        The model's tensors do not come as ``dtype``.
    """
    resolved = card.dtype(part.modality, dtype)
    if resolved is None:
        dtypes = ", ".join(card.dtypes[part.modality])
        raise InvalidRequest(
            f"This model's tensors of modality '{part.modality}' come as {dtypes}, not as {dtype}.", param="mm_dtype"
        )
    options = ItemOptions(resolved, pack_io(io.get(part.modality, {})), kwargs.get(part.modality, b""))
    processed = variant(
        scope=scope,
        hash_name=hash_name,
        modality=part.modality,
        fingerprint=card.fingerprint,
        dtype=resolved,
        options=encode_parts((options.io, options.kwargs)) if options.kwargs else options.io,
    )
    name = None if part.uuid is None else alias(scope=scope, modality=part.modality, uuid=part.uuid)
    other = None
    if injected and part.uuid is not None:
        other = injected_key(scope=scope, modality=part.modality, fingerprint=card.fingerprint, name=part.uuid)
    if medium is None:
        assert name is not None, "a part without data and uuid was not refused"
        return Recalled(name, processed, part.modality, other)
    least, a_byte = _COST[part.modality]
    pixels = medium.pixels if part.modality == "image" else 0
    return OfferItem(
        key=item_key(processed, medium.digest),
        modality=part.modality,
        medium=medium.data,
        digest=medium.digest,
        options=msgspec.msgpack.encode(options),
        cost=max(least, pixels or len(medium.data) * a_byte),
        alias=None if name is None else Alias(name, medium.digest, other),
        variant=b"" if name is None else processed,
    )


def recalled_within(parts: Sequence[MediaPart], media: Sequence[Medium | None]) -> list[Medium | None]:
    """Return the media; for a part without data the one that came last, in an earlier part, with the same uuid.

    So a request's parts mean what they would mean if each were sent on its own, one after the other.
    """
    last: dict[tuple[str, str], Medium] = {}
    found: list[Medium | None] = []
    for part, given in zip(parts, media, strict=True):
        medium = given
        if part.uuid is not None:
            name = (part.modality, part.uuid)
            if given is None:
                medium = last.get(name)
            else:
                last[name] = given
        found.append(medium)
    return found


def key_of(item: OfferItem | Recalled, answer: ItemAnswer, meta: ItemMeta) -> bytes:
    """Return what an item is to engines, by its metadata; raises ValueError where a recalled one's key is missing."""
    key = item.key if isinstance(item, OfferItem) else answer.key
    if key is None:
        raise ValueError("an answer lacks the key of an item that was recalled")
    return key if meta.injected is None else injected_hash(key, meta.injected)


def check_injected(part: MediaPart, meta: ItemMeta, card: ModelCard, dtype: str) -> None:
    """Refuse an item that was injected as another dtype than a request wants: an engine would take its numbers for something else.

    Raises
    ------
    NotFound
        ``param`` names the part.
    """
    if meta.injected is None:
        return
    wanted_dtype = card.dtype(part.modality, dtype)
    main = card.fields[part.modality][0].name
    given = next(spec.dtype for spec in meta.fields if spec.name == main)
    if given != wanted_dtype:
        raise NotFound(
            f"What is known here by this 'uuid' was injected as {given}, not as {wanted_dtype}; inject it so, or ask for "
            f"mm_dtype {given}.",
            param=part.param,
        )
