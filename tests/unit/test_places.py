import pytest

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.places import Places

PLACES = Places(
    {
        "messages": "input",
        "messages[1]": "input[3]",
        "messages[1].content[0].image_url": "input[3].content[2].source",
        "stop": "stop_sequences",
    }
)


@pytest.mark.parametrize(
    ("param", "original"),
    [
        (None, None),
        ("messages", "input"),
        ("messages[1]", "input[3]"),
        ("messages[1].content[0].image_url", "input[3].content[2].source"),
        ("messages[1].content[0].image_url.url", "input[3].content[2].source.url"),
        ("messages[1].content[1].image_url", "input[3].content[1].image_url"),
        ("messages[11].content", "input[11].content"),
        ("stop[2]", "stop_sequences[2]"),
        ("stop_token_ids", "stop_token_ids"),
        ("temperature", "temperature"),
    ],
)
def test_a_place_is_translated_by_the_longest_one_that_is_known(param, original):
    assert PLACES.original(param) == original


def test_errors_of_a_block_name_the_places_that_were_sent():
    with pytest.raises(InvalidRequest) as caught, PLACES.renaming():
        raise InvalidRequest("no", param="messages[1].role")
    assert caught.value.param == "input[3].role"
