"""What comes in over a socket is a message of the schema, or a ProtocolError and nothing else."""

from __future__ import annotations

import math
import tracemalloc
from typing import get_args

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect
from tests.wire_strategies import LINKS, MESSAGES, instances

from mmprep.card import ItemOptions
from mmprep.errors import ProtocolError
from mmprep.job_content import JobContent
from mmprep.layout import MAX_COUNTER, MAX_INCARNATION, generation
from mmprep.result import Head
from mmprep.wire import messages
from mmprep.wire.codec import CONTROL_LIMIT, pack, unpack

ANY_LINK = st.sampled_from(list(LINKS.values()))
ANY_MESSAGE = st.sampled_from(MESSAGES).flatmap(instances)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**33), st.integers(0, 999_999_999)),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=12,
)
CANCEL = msgspec.to_builtins(messages.Cancel(7))


def refused(frame, kind=messages.ToWriter, **limits):
    with pytest.raises(ProtocolError) as caught:
        unpack(frame, kind, **limits)
    assert caught.value.code == 400
    return caught.value.message


def takes_or_refuses(frame, kind):
    """Return whether ``frame`` is a message of ``kind``; any other error than ProtocolError fails the test."""
    try:
        message = unpack(frame, kind)
    except ProtocolError:
        return False
    assert isinstance(message, get_args(kind) or kind)
    return True


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was_sent_and_is_refused_when_it_was_cut(kind):
    @given(instances(kind), st.data())
    def check(message, data):
        frame = pack(message)
        assert unpack(frame, kind) == message
        refused(frame[: data.draw(st.integers(0, len(frame) - 1))], kind)
        for link in LINKS.values():
            assert takes_or_refuses(frame, link) == (kind in get_args(link))

    check()


def test_the_tags_of_a_link_are_unique():
    for link in LINKS.values():
        tags = [kind.__struct_config__.tag for kind in get_args(link)]
        assert len(tags) == len(set(tags))


@given(st.binary(max_size=200), ANY_LINK)
def test_random_bytes_are_a_message_or_a_protocol_error(frame, link):
    takes_or_refuses(frame, link)


@given(PLAIN, ANY_LINK)
def test_random_values_are_a_message_or_a_protocol_error(plain, link):
    takes_or_refuses(msgpack.packb(plain), link)


@given(ANY_MESSAGE, ANY_LINK, st.data())
def test_damaged_frames_are_a_message_or_a_protocol_error(message, link, data):
    frame = bytearray(pack(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        what = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if what == "change":
            frame[at] = data.draw(st.integers(0, 255))
        elif what == "cut" and len(frame) > 1:
            del frame[at : at + data.draw(st.integers(1, 9))]
            frame = frame or bytearray(1)
        else:
            frame[at:at] = data.draw(st.binary(max_size=9))
    takes_or_refuses(bytes(frame), link)


@given(ANY_MESSAGE, PLAIN, st.data())
def test_a_message_with_another_value_in_a_field_is_valid_or_a_protocol_error(message, plain, data):
    parts = msgspec.to_builtins(message, builtin_types=(bytes,))
    parts = list(parts)
    parts[data.draw(st.integers(0, len(parts) - 1))] = plain
    takes_or_refuses(msgpack.packb(parts), type(message))


def test_what_is_behind_a_message_is_refused():
    assert "MessagePack" in refused(pack(messages.Cancel(7)) + b"\x00")


@pytest.mark.parametrize(
    "plain",
    [
        [],
        ["Cancel"],
        ["Cancel", 1, 2],
        ["Cancel", None],
        ["Cancel", True],
        ["Cancel", "1"],
        ["Cancel", 1.0],
        ["Cancel", math.nan],
        ["Cancel", math.inf],
        ["Cancel", -1],
        ["Cancel", 2**48 + 1],
        ["Cancel", 2**64 - 1],
        ["Cancel", [1]],
        ["cancel", 1],
        ["Granted", 1, 2, 3],
        ["", 1],
        [1, 1],
        [None, 1],
        [["Cancel"], 1],
        {"type": "Cancel", "call": 1},
        "Cancel",
        b"Cancel",
        None,
        7,
    ],
    ids=repr,
)
def test_what_is_no_message_of_the_link_is_refused(plain):
    refused(msgpack.packb(plain))


def test_a_frame_above_the_limit_is_refused_unread():
    assert str(CONTROL_LIMIT) in refused(bytes(CONTROL_LIMIT + 1))
    assert "above the limit of 3" in refused(msgpack.packb(CANCEL), limit=3)


def test_a_message_that_would_be_above_the_limit_is_not_sent():
    assert len(pack(messages.Card(bytes(CONTROL_LIMIT - 9)))) == CONTROL_LIMIT
    with pytest.raises(ProtocolError, match="Card"):
        pack(messages.Card(bytes(CONTROL_LIMIT - 8)))


def places(kind):
    """Yield a type, and every type within it."""
    yield kind
    if isinstance(kind, inspect.StructType):
        inner = [field.type for field in kind.fields]
    elif isinstance(kind, inspect.UnionType):
        inner = kind.types
    elif isinstance(kind, inspect.TupleType):
        inner = kind.item_types
    elif isinstance(kind, inspect.VarTupleType | inspect.ListType):
        inner = [kind.item_type]
    else:
        inner = []
    for one in inner:
        yield from places(one)


@pytest.mark.parametrize("kind", [*MESSAGES, Head, JobContent, ItemOptions], ids=lambda kind: kind.__name__)
def test_no_message_has_a_place_for_maps_numbers_with_a_point_or_just_anything(kind):
    """So no key comes twice, and no number is none."""
    found = list(places(inspect.type_info(kind)))
    assert len(found) > len(kind.__struct_fields__)
    for place in found:
        assert not isinstance(place, inspect.DictType | inspect.FloatType | inspect.AnyType | inspect.RawType)
        if isinstance(place, inspect.StructType):
            assert place.array_like
            assert place.forbid_unknown_fields


def test_maps_are_refused():
    refused(b"\x82\xa1a\x01\xa1a\x02")
    refused(b"\x81\x90\x01")
    refused(b"\x81\x01\x01")
    refused(b"\x92\xa6Cancel\x82\xa1a\x01\xa1a\x02")


@pytest.mark.parametrize("code", [0, 3, 127])
def test_extension_types_are_refused(code):
    assert "`ext`" in refused(msgpack.packb(["Cancel", msgpack.ExtType(code, b"1234")]))


@pytest.mark.parametrize("stamp", [msgpack.Timestamp(1, 0), msgpack.Timestamp(2**40, 5)], ids=repr)
def test_timestamps_are_refused_wherever_they_stand(stamp):
    refused(msgpack.packb(["Cancel", stamp]))
    refused(msgpack.packb([stamp, 1]))
    refused(msgpack.packb(["Card", stamp]), messages.FromWriter)
    refused(msgpack.packb(stamp))


@pytest.mark.parametrize(
    "frame", [b"\xc7\x0c\xff" + b"\xff" * 12, b"\xd6\xff\xff\xff\xff\xff", b"\xd4\xff\x00"], ids=repr
)
def test_damaged_timestamps_are_refused(frame):
    refused(b"\x92\xa6Cancel" + frame)


@pytest.mark.parametrize("depth", [100, 1023, 1024, 2000, 60_000])
def test_deep_nesting_is_refused(depth):
    refused(b"\x91" * depth + b"\x01")
    refused(b"\x81\xa1a" * min(depth, 20_000) + b"\x01")


@pytest.mark.parametrize(
    "frame",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xdc\xff\xff",
    ],
    ids=repr,
)
def test_lengths_that_are_not_there_are_refused(frame):
    refused(frame)
    refused(b"\x92\xa6Cancel" + frame)


def test_text_is_not_taken_for_bytes():
    refused(msgpack.packb(["Card", "Y2FyZA=="]), messages.FromWriter)


def test_text_that_is_no_unicode_is_refused():
    refused(b"\x92\xa2\xff\xfe\x01")


def test_more_items_than_an_offer_may_have_are_refused():
    item = ["Offered", bytes(32), "image", 1, 1]
    offer = ["Offer", 1, "plan", 1000, 0, [item] * 257, None]
    refused(msgpack.packb(offer))
    offer[5] = [item] * 256
    assert len(unpack(msgpack.packb(offer), messages.ToWriter).items) == 256
    offer[5] = []
    refused(msgpack.packb(offer))


def test_the_largest_offers_fit_into_a_control_frame():
    most, widest = 2**48, "\U0001f5bc" * 16
    alias = messages.Alias(bytes(32), bytes(32))
    kinds = (
        messages.Offered(bytes(32), widest, most, most, alias),
        messages.Recalled(bytes(32), bytes(32), widest),
    )
    for item in kinds:
        offer = messages.Offer(most, "tensors", most, most, (item,) * messages.MAX_ITEMS)
        assert unpack(pack(offer), messages.ToWriter) == offer


def test_an_item_of_an_offer_is_offered_or_recalled_and_nothing_else():
    for item in (
        ["Offer", bytes(32), "image", 1, 1],
        ["Offered", bytes(32), "image", 1, 1, [bytes(32)]],
        ["Recalled", bytes(32), "image"],
        ["Recalled", bytes(32), bytes(31), "image"],
        [bytes(32), "image", 1, 1],
        [],
    ):
        refused(msgpack.packb(["Offer", 1, "plan", 1000, 0, [item], None]))


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a" * 65, "ä", "a b", "a\n", "a\0"])
def test_names_that_would_be_other_files_are_refused(name):
    refused(msgpack.packb(["Hello", 1, "1", "frontend", name, 1]))


def test_an_error_says_where_the_fault_is_and_shows_no_content():
    message = refused(msgpack.packb(["Put", "0", 1, "blake3", b"secret", b""]), messages.Put)
    assert "$[4]" in message
    assert "secret" not in message


def test_a_frame_may_be_a_view_of_memory():
    assert unpack(memoryview(pack(messages.Cancel(7))), messages.ToWriter) == messages.Cancel(7)


@pytest.mark.parametrize("depth", [10, 500, 1000, 5000])
def test_a_frame_that_claims_more_than_it_has_takes_no_memory_for_it(depth):
    frame = b"\xdc\x40\x00" * depth  # lists of 16384, each the first element of the one around it
    tracemalloc.start()
    try:
        refused(frame)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


LATE = generation(MAX_INCARNATION, MAX_COUNTER)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (messages.Acquire(1, 2, LATE, "view"), messages.ToWriter),
        (messages.Reassert(1, (messages.Held(bytes(16), 2, LATE, "copy"),), True), messages.ToWriter),
        (messages.Repin(1, ((2, LATE),)), messages.ToWriter),
        (messages.GrantedSpill(1, "/name", bytes(16), MAX_INCARNATION, bytes(32), LATE, 64), messages.ToLane),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_last_possible_writer_grants_can_be_spoken_of(message, kind):
    assert unpack(pack(message), kind) == message
