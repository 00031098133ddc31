"""The outbox against a list for each peer."""

from __future__ import annotations

from collections import defaultdict

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.machines import at_length

from mmprep.errors import Busy
from mmprep.wire.outbox import Outbox

MAX_MESSAGES, MAX_BYTES = 4, 30
PEERS = st.sampled_from([b"a", b"b", b"c"])
FRAMES = st.lists(st.binary(max_size=16), min_size=1, max_size=3)


class OutboxMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.outbox = Outbox(max_messages=MAX_MESSAGES, max_bytes=MAX_BYTES)
        self.waiting = defaultdict(list)

    @rule(peer=PEERS, frames=FRAMES)
    def add(self, peer, frames):
        queue = self.waiting[peer]
        nbytes = sum(len(frame) for message in [*queue, frames] for frame in message)
        if len(queue) == MAX_MESSAGES or nbytes > MAX_BYTES:
            with pytest.raises(Busy):
                self.outbox.add(peer, frames)
        else:
            self.outbox.add(peer, frames)
            queue.append(frames)

    @rule(takes=st.sets(PEERS))
    def the_socket_takes_the_first_message_of_some_peers(self, takes):
        for peer, frames in self.outbox.first():
            assert frames is self.waiting[peer][0]
            if peer in takes:
                self.outbox.sent(peer)
                self.waiting[peer].pop(0)

    @rule(peer=PEERS)
    def a_peer_is_gone(self, peer):
        self.outbox.drop(peer)
        self.waiting[peer].clear()

    @rule(peer=PEERS)
    def a_peer_goes_while_the_first_messages_are_looked_at(self, peer):
        for _ in self.outbox.first():
            self.outbox.drop(peer)
        self.waiting[peer].clear()

    @invariant()
    def what_waits_is_what_was_added_in_order(self):
        self.outbox.validate()
        first = {peer: queue[0] for peer, queue in self.waiting.items() if queue}
        assert dict(self.outbox.first()) == first
        assert bool(self.outbox) == bool(first)
        for peer, queue in self.waiting.items():
            assert self.outbox.holds(peer) == bool(queue)

    def teardown(self):
        """Everything goes out in order, and then nothing is kept."""
        while self.outbox:
            self.the_socket_takes_the_first_message_of_some_peers({b"a", b"b", b"c"})
        assert not any(self.waiting.values())
        assert not self.outbox._bytes


OutboxMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestOutboxMachine = OutboxMachine.TestCase
TestOutboxMachineAtLength = at_length(OutboxMachine)
