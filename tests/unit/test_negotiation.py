"""Which encoding a client gets for what it accepts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep_frontend.http.negotiation import encoding_for
from mmprep_frontend.render.encodings import JSON, MSGPACK


@pytest.mark.parametrize(
    "accept",
    [
        "application/msgpack",
        "Application/MsgPack",
        "application/msgpack; charset=x",
        "application/msgpack;q=0.1",
        "application/msgpack, */*",
        "application/msgpack, application/json",
        "application/json, application/msgpack",
        "application/json; q=0.9, application/msgpack;q=1.0",
        "text/html, application/msgpack ; q=0.5, */*;q=0.1",
        "application/msgpack;q=0.3, application/json;q=0, */*",
        "application/msgpack;q=0.3, application/*;q=0.2, */*",
    ],
)
def test_who_names_messagepack_gets_it_unless_json_is_preferred(accept):
    assert encoding_for(accept) is MSGPACK


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "application/*",
        "application/json",
        "application/json, text/plain, */*",
        "application/msgpack;q=0",
        "application/msgpack;q=0, */*",
        "application/msgpack;q=0.5, application/json",
        "application/msgpack;q=0.5, application/*;q=0.6",
        "application/msgpack;q=0.5, */*",
        "application/msgpacked",
        "x-application/msgpack",
        # Neither, or no header at all: as engines, which do not look at it.
        "text/html",
        "application/json;q=0",
        "application/msgpack;q=nan",
        "application/msgpack;q=2",
        "application/msgpack;q=",
        ",;=,application/msgpack;q=a,",
    ],
)
def test_everybody_else_gets_json(accept):
    assert encoding_for(accept) is JSON


@given(st.text(max_size=60).map(lambda text: "msgpack" + text) | st.text("aplicton/msgk,;=q01.* ", max_size=60))
def test_no_header_is_an_error(accept):
    assert encoding_for(accept) in (JSON, MSGPACK)
