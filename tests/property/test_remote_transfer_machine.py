"""Tensors on their way to another host: both ends of the protocol, with a connection between them that keeps order."""

from __future__ import annotations

from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.machines import at_length

from mmprep.errors import ProtocolError
from mmprep.remote.chunks import count
from mmprep.remote.reception import Reception
from mmprep.remote.supply import Supply

CHUNK, CREDITS = 4, 3
NAMES = [b"a", b"b", b"c", b"d"]
LENGTHS = st.integers(1, 30)


def content(name, length):
    return bytes((name[0] + place) % 251 for place in range(length))


class TransferMachine(RuleBasedStateMachine):
    """A door that keeps to the protocol and a backend that does; items end early on both sides."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.supply = Supply(chunk=CHUNK, credits=CREDITS)
        self.reception = Reception(chunk=CHUNK, credits=CREDITS)
        self.to_door = deque()
        self.to_backend = deque()
        self.number = 0
        #: What the door holds, and what the backend wants, by lease.
        self.lent = {}
        self.wanted = {}
        self.got = {}
        self.complete = set()
        self.ended = set()

    def ask(self, asks):
        self.to_door.extend(("ask", *ask) for ask in asks)

    @rule(length=LENGTHS)
    def the_backend_opens_an_item(self, length):
        lease = NAMES[self.number % len(NAMES)] + bytes([self.number // len(NAMES)])
        self.number += 1
        self.lent[lease] = self.wanted[lease] = content(lease, length)
        self.got[lease] = bytearray()
        self.ask(self.reception.begin(lease, length, self.now))

    @rule()
    def the_door_hears_something(self):
        if not self.to_door:
            return
        kind, lease, *rest = self.to_door.popleft()
        if kind == "release":
            self.supply.ended(lease)
            self.lent.pop(lease, None)
        elif lease not in self.lent:
            self.to_backend.append(("ended", lease))
        else:
            upto, received = rest
            data = self.lent[lease]
            for piece in self.supply.asked(lease, len(data), upto=upto, received=received, now=self.now):
                self.to_backend.append(("chunk", lease, piece.number, data[piece.start : piece.stop]))

    @rule()
    def the_backend_hears_something(self):
        if not self.to_backend:
            return
        kind, lease, *rest = self.to_backend.popleft()
        if kind == "ended":
            self.ended.add(lease)
            self.ask(self.reception.ended(lease, self.now))
            return
        number, data = rest
        arrival = self.reception.arrived(lease, number, len(data), self.now)
        if arrival.offset is not None:
            assert arrival.offset == len(self.got[lease]), "a byte is missing, or came twice"
            self.got[lease] += data
        if arrival.complete:
            assert self.got[lease] == self.wanted[lease]
            self.complete.add(lease)
        self.ask(arrival.asks)

    @rule(data=st.data())
    def the_backend_does_not_want_an_item_any_more(self, data):
        under_way = sorted(lease for lease in self.wanted if lease in self.reception)
        if under_way:
            lease = data.draw(st.sampled_from(under_way))
            del self.wanted[lease]
            self.to_door.append(("release", lease))
            self.ask(self.reception.abandon(lease, self.now))

    @rule(data=st.data())
    def a_lease_ends_at_the_door(self, data):
        if self.lent:
            lease = data.draw(st.sampled_from(sorted(self.lent)))
            del self.lent[lease]
            self.supply.ended(lease)

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.ask(self.reception.tell())

    @rule()
    def the_door_gives_up_what_stands_still(self):
        for lease in self.supply.stalled(self.now, 10.0):
            self.supply.ended(lease)
            self.lent.pop(lease, None)
            self.to_backend.append(("ended", lease))

    @invariant()
    def both_keep_their_promises(self):
        self.supply.validate()
        self.reception.validate()
        chunks = sum(kind == "chunk" for kind, *_ in self.to_backend)
        assert chunks <= CREDITS, "more chunks are on their way than there are credits"

    def teardown(self):
        """What is still wanted comes, or is said not to come."""
        while self.to_door or self.to_backend:
            self.the_door_hears_something()
            self.the_backend_hears_something()
            self.both_keep_their_promises()
        assert not self.reception.under_way
        assert self.wanted.keys() <= self.complete | self.ended


TransferMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestTransferMachine = TransferMachine.TestCase
TestTransferMachineAtLength = at_length(TransferMachine)

ASKS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 8), st.integers(0, 8)), max_size=30)


@given(lengths=st.lists(LENGTHS, min_size=4, max_size=4), asks=ASKS)
def test_whoever_asks_for_anything_gets_each_byte_once_in_order_and_never_more_than_the_credits(lengths, asks):
    supply = Supply(chunk=CHUNK, credits=CREDITS)
    length = dict(zip(NAMES, lengths, strict=True))
    sent = dict.fromkeys(NAMES, 0)
    received = dict.fromkeys(NAMES, 0)
    for lease, upto, said in asks:
        try:
            pieces = supply.asked(lease, length[lease], upto=upto, received=said, now=0.0)
        except ProtocolError:
            with pytest.raises(ProtocolError):
                supply.asked(lease, length[lease], upto=upto, received=said, now=0.0)
            received[lease] = sent[lease]  # nothing more of it comes
            continue
        for piece in pieces:
            assert piece.start == piece.number * CHUNK == sent[lease] * CHUNK
            assert piece.start < piece.stop <= length[lease]
            sent[lease] += 1
        received[lease] = said
        supply.validate()
        assert sum(sent.values()) - sum(received.values()) <= CREDITS


@pytest.mark.parametrize(
    ("upto", "received", "why"),
    [(4, 0, "3 chunks"), (1, 0, "twice"), (2, 0, "twice"), (3, 3, "received")],
)
def test_what_a_backend_may_not_ask_for_is_refused_and_ends_that_item_alone(upto, received, why):
    supply = Supply(chunk=4, credits=8)
    assert count(10, 4) == 3
    assert [piece[1:] for piece in supply.asked(b"a", 10, upto=2, received=0, now=0.0)] == [(0, 4), (4, 8)]
    with pytest.raises(ProtocolError, match=why):
        supply.asked(b"a", 10, upto=upto, received=received, now=0.0)
    with pytest.raises(ProtocolError, match="open it again"):
        supply.asked(b"a", 10, upto=3, received=0, now=0.0)
    assert [piece[1:] for piece in supply.asked(b"b", 3, upto=1, received=0, now=0.0)] == [(0, 3)]
    supply.asked(b"b", 3, upto=1, received=1, now=0.0)
    assert supply.complete(b"b")


def test_what_does_not_move_is_found_after_its_time_and_what_is_complete_never():
    supply = Supply(chunk=4, credits=8)
    supply.asked(b"a", 10, upto=2, received=0, now=0.0)
    supply.asked(b"b", 4, upto=1, received=0, now=1.0)
    supply.asked(b"b", 4, upto=1, received=1, now=2.0)
    assert supply.stalled(9.9, 10.0) == []
    assert supply.stalled(10.0, 10.0) == [b"a"]
    supply.ended(b"a")
    assert supply.stalled(100.0, 10.0) == []


@pytest.mark.parametrize(("number", "nbytes"), [(1, 4), (0, 3), (0, 5), (3, 2)])
def test_a_chunk_that_was_not_asked_for_or_has_another_size_is_refused(number, nbytes):
    reception = Reception(chunk=4, credits=8)
    reception.begin(b"a", 10, 0.0)
    with pytest.raises(ProtocolError):
        reception.arrived(b"a", number, nbytes, 0.0)
    with pytest.raises(ProtocolError):
        reception.arrived(b"b", 0, 4, 0.0)
    assert reception.arrived(b"a", 0, 4, 0.0).offset == 0
