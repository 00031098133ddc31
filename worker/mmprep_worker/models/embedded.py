"""Media that somebody else has embedded already: a lane reads their files as the frontend did, and copies what is in them.

The frontend has read the same bytes, to know the range. Nothing of that is relied on: how much memory the lane asks for, and
what it writes there, follow from the file that it has, whose digest it has checked.
"""

from __future__ import annotations

from mmprep.card import Grid, ModelCard
from mmprep.embeddings import read_embeddings
from mmprep.errors import InvalidRequest
from mmprep_worker.models.ready import ReadyItem


def open_embedded(card: ModelCard, modality: str, medium: bytes | memoryview, grid: Grid) -> ReadyItem:
    """Return the item of one embedded medium.

    Parameters
    ----------
    card:
        Of the family.
    modality:
        Of the task.
    medium:
        The ``.npy`` file; the result keeps a reference.
    grid:
        Of the task's options.

    Raises
    ------
    InvalidRequest
        It is no such file, contradicts the grid, or the model takes no such media.
    """
    how, placeholder = card.embeds.get(modality), card.placeholder(modality)
    if how is None or placeholder is None:
        raise InvalidRequest(f"this model takes no media of modality {modality!r} that are embedded already")
    meta, arrays = read_embeddings(modality, medium, grid, how, token_id=placeholder.token_id)
    return ReadyItem(meta, arrays)
