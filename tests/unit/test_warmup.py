"""What a lane's warm-up covers, and what it says where it fails."""

import pytest

from mmprep import embedded
from mmprep.errors import DecodeError, TooLarge
from mmprep_worker.lanes.warmup import ColdError, warm_up
from mmprep_worker.models.family import MediaLimits
from mmprep_worker.models.registry import load_family

LIMITS = MediaLimits(1 << 24, 64, 60.0, 60.0)


@pytest.fixture(scope="module")
def family():
    return load_family(embedded.path(), LIMITS)


class Watched:
    """A family that notes what it is asked for, and can fail at it."""

    def __init__(self, family, error=None):
        self.card = family.card
        self.planned, self.opened = set(), set()
        self._family = family
        self._error = error

    def plan(self, modality, medium, options):
        self.planned.add((modality, options.dtype))
        return self._family.plan(modality, medium, options)

    def open(self, modality, medium, options):
        self.opened.add((modality, options.dtype))
        if self._error is not None and modality == "video":
            raise self._error
        return self._family.open(modality, medium, options)


def test_every_modality_that_requests_may_have_is_planned_and_processed_in_every_dtype(family):
    watched = Watched(family)
    warm_up(watched, {"image", "video", "audio"})
    everything = {(modality, dtype) for modality, dtypes in family.card.dtypes.items() for dtype in dtypes}
    assert {modality for modality, _ in everything} == {"image", "video"}
    assert watched.planned == watched.opened == everything


def test_a_modality_that_no_request_may_have_is_left_out(family):
    watched = Watched(family)
    warm_up(watched, {"image"})
    assert {modality for modality, _ in watched.planned | watched.opened} == {"image"}


@pytest.mark.parametrize(
    ("error", "why"),
    [(KeyError("/models/secret.json"), "KeyError"), (DecodeError("the stream ends early"), "the stream ends early")],
)
def test_a_failure_says_what_was_tried_and_no_path(family, error, why):
    with pytest.raises(ColdError) as failed:
        warm_up(Watched(family, error), {"image", "video"})
    assert str(failed.value) == f"a lane cannot be warmed up with a small video in uint8: {why}"


def test_what_is_above_the_limits_of_the_service_is_no_failure(family):
    warm_up(Watched(family, TooLarge("too large")), {"image", "video"})
