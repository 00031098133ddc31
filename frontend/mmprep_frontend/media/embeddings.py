"""Pictures that somebody else has embedded already, as a request has them; :mod:`mmprep.embeddings` reads their files. Pure.

The range in the prompt is as long as the embeddings have rows. Where their tensors are to travel the writer never hears of
them, since there is nothing to compute. Where addresses are asked for, and for a queue, they are to lie in shared memory: then
they are offered to the writer as other media are, and stay in its cache like them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import pybase64

from mmprep.card import LARGEST_SIDE, Grid, ItemOptions, ModelCard
from mmprep.digest import HashName
from mmprep.embeddings import Embeddings, read_embeddings, read_npy
from mmprep.errors import InvalidRequest
from mmprep.items import field_array, region_size
from mmprep.keys import item_key
from mmprep_frontend.media.intake import Medium
from mmprep_frontend.media.keys import variant
from mmprep_frontend.offered import OfferItem, copying_cost
from mmprep_frontend.render.conversation import MediaPart

#: Characters of the base64 of three numbers' ``.npy`` file; numpy's has 204.
_LONGEST_GRID = 1024


class EmbeddedItem(NamedTuple):
    """One embedded medium as an item.

    Attributes
    ----------
    embeddings: its metadata and tensors.
    wanted: what the writer is asked for, where it is: the file, for a lane to copy the tensors from. Its key is what the item
        is to engines in any case.
    """

    embeddings: Embeddings
    wanted: OfferItem

    def region(self) -> memoryview:
        """Return the tensors as they are laid out, copied."""
        specs = self.embeddings.meta.fields
        region = memoryview(bytearray(region_size(specs)))
        for spec in specs:
            field_array(region, spec)[...] = self.embeddings.arrays[spec.name]
        return region


def embedded_item(
    part: MediaPart, medium: Medium, *, card: ModelCard, scope: bytes, hash_name: HashName
) -> EmbeddedItem:
    """Return the item of an embedded medium; nothing is copied.

    Parameters
    ----------
    part:
        Of the request; it tells the grid.
    medium:
        Its ``.npy`` file.
    card:
        Of the served model, which takes such media.
    scope:
        From :func:`mmprep_frontend.media.keys.scope`.
    hash_name:
        Which hash the medium's digest is of.

    Raises
    ------
    InvalidRequest
        It is no such file, or contradicts the grid; ``param`` names the place.
    """
    how, placeholder = card.embeds[part.modality], card.placeholder(part.modality)
    assert placeholder is not None
    assert part.grid is not None, "a medium that is not embedded is read as if it were"
    grid = read_grid(part.grid, f"{part.param}.{how.grid}")
    embeddings = read_embeddings(part.modality, medium.data, grid, how, token_id=placeholder.token_id, param=part.param)
    dtype = embeddings.meta.fields[0].dtype
    processed = variant(
        scope=scope,
        hash_name=hash_name,
        modality=part.modality,
        fingerprint=card.fingerprint,
        dtype=dtype,
        options=b"embedded" + embeddings.meta.cpu[how.grid],
    )
    wanted = OfferItem(
        key=item_key(processed, medium.digest),
        modality=part.modality,
        medium=medium.data,
        digest=medium.digest,
        options=msgspec.msgpack.encode(ItemOptions(dtype, grid=grid)),
        cost=copying_cost(len(medium.data)),
    )
    return EmbeddedItem(embeddings, wanted)


def read_grid(grid: str | Sequence[int], param: str) -> Grid:
    """Return time, height and width in patches.

    Parameters
    ----------
    grid: three numbers, or the ``.npy`` file of them in base64.
    param: the place in the request.

    Raises
    ------
    InvalidRequest
        They are no three sides.
    """
    if isinstance(grid, str):
        try:
            decoded = pybase64.b64decode(grid, validate=True) if len(grid) <= _LONGEST_GRID else b""
        except ValueError:
            raise InvalidRequest("This is not valid base64.", param=param) from None
        grid = read_npy(decoded, param).reshape(-1).tolist()
    try:
        sides = msgspec.convert(list(grid), tuple[int, int, int])
    except msgspec.ValidationError:
        raise InvalidRequest(
            "The grid is three whole numbers: time, height and width in patches.", param=param
        ) from None
    if not all(0 < side <= LARGEST_SIDE for side in sides):
        raise InvalidRequest("Each side of the grid is at least one patch.", param=param)
    return sides
