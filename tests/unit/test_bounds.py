"""The bounds of a request's text."""

import pytest

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.bounds import TextBounds

BOUNDS = TextBounds(max_model_len=1_000_000, longest_token=16)


@pytest.mark.parametrize(
    ("check", "most"),
    [
        (BOUNDS.check_prompt, 16_000_000),
        (BOUNDS.check_counted, 16_000_000),
        (BOUNDS.check_json, 12 * 16_000_000),
        (TextBounds(100, 16).check_prompt, 1600),
        (TextBounds(100, 16).check_counted, 1 << 20),
        (TextBounds(100, 16).check_json, 16 << 20),
    ],
)
def test_what_is_at_the_bound_passes_and_what_is_above_is_told_the_numbers(check, most):
    check(most)
    with pytest.raises(InvalidRequest, match=f"{most + 1}.*{most}"):
        check(most + 1)
