"""Puts each medium's token ids in the place of its placeholder.

Between the ranges, the ids are those of the prompt, unchanged and in order. The k-th placeholder of a modality takes
the k-th plan of that modality.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmprep.errors import InvalidRequest
from mmprep.items import Plan
from mmprep_frontend.render.tokens import Placed


@dataclass(frozen=True)
class Range:
    """Where one medium's ids are. ``is_embed`` says which take an embedding; ``None``: all of them."""

    modality: str
    offset: int
    length: int
    is_embed: list[bool] | None


@dataclass(frozen=True)
class Expanded:
    """A prompt with all media's ids in it, and their ranges in the prompt's order."""

    token_ids: list[int]
    ranges: list[Range]


def expand(token_ids: Sequence[int], placeholders: Sequence[Placed], plans: Mapping[str, Sequence[Plan]]) -> Expanded:
    """Return the prompt with every placeholder replaced.

    Parameters
    ----------
    token_ids: of the prompt, one id a placeholder.
    placeholders: where they are, in order.
    plans: of the media of each modality, in the conversation's order.

    Raises
    ------
    InvalidRequest
        There are more or fewer media than placeholders.
    """
    _check_counts(placeholders, plans)
    remaining = {modality: iter(of_modality) for modality, of_modality in plans.items()}
    expanded: list[int] = []
    ranges = []
    done = 0
    for placed in placeholders:
        expanded += token_ids[done : placed.position]
        done = placed.position + 1
        offset = len(expanded)
        plan = next(remaining[placed.modality])
        for run in plan.runs:
            expanded += [run.token_id] * run.count
        ranges.append(Range(placed.modality, offset, len(expanded) - offset, plan.is_embed()))
    expanded += token_ids[done:]
    return Expanded(expanded, ranges)


def _check_counts(placeholders: Sequence[Placed], plans: Mapping[str, Sequence[Plan]]) -> None:
    places = Counter(placed.modality for placed in placeholders)
    for modality in {*places, *plans}:
        items = len(plans.get(modality, ()))
        if items != places[modality]:
            raise InvalidRequest(
                f"The request has {items} of modality '{modality}', and the rendered prompt has room for "
                f"{places[modality]}.",
                param="messages",
            )
