"""A reader's leases against writers that come and go: what it believes to hold is held, or it was told otherwise."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmprep.address import lease_id
from mmprep.holdings import Holdings, Life

SECONDS = 30.0
SLOTS = st.integers(0, 3)
KINDS = st.sampled_from(["copy", "view"])


class HoldingsMachine(RuleBasedStateMachine):
    """The model: each writer's table of leases, and what went between it and the reader, in order."""

    @initialize()
    def begin(self):
        self.holdings = Holdings()
        self.now = 100.0
        self.numbers = 0
        self.life = None
        self.table = {}
        self.granted = []
        self.believed = set()
        self.telling = []
        self.connect(epoch=1, incarnation=1)

    def connect(self, epoch, incarnation):
        former, self.life = self.life, Life(f"{epoch:032x}", incarnation)
        if former is None or former.epoch != self.life.epoch:
            self.believed.clear()
            self.asked = set()
        if former != self.life:
            self.table = {}
        held = self.holdings.welcomed(self.life, SECONDS)
        self.telling.clear()
        assert {one.lease for one in held} == self.believed
        for one in held:
            self.table[one.lease] = (one.slot, one.generation, one.kind)

    @rule(slot=SLOTS, kind=KINDS)
    def grant(self, slot, kind):
        """The writer grants a lease; its answer is on its way."""
        self.numbers += 1
        lease = lease_id(self.life.incarnation, self.numbers.to_bytes(12, "big"))
        self.table[lease] = (slot, self.numbers, kind)
        self.granted.append((lease, slot, self.numbers, kind, self.life, self.now))

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), sure=st.booleans())
    def receive(self, data, sure):
        """The answer arrives, perhaps after another writer has taken over."""
        one = self.granted.pop(data.draw(st.integers(0, len(self.granted) - 1)))
        lease, slot, generation, kind, life, sent_at = one
        good = self.holdings.adopt(lease, slot, generation, kind, epoch=life.epoch, sent_at=sent_at, sure=sure)
        known = life == self.life and lease not in self.asked
        assert good == known, "good is what the present writer knows, and nothing else"
        if good:
            self.believed.add(lease)

    @precondition(lambda self: self.believed)
    @rule(data=st.data())
    def drop(self, data):
        lease = data.draw(st.sampled_from(sorted(self.believed)))
        self.holdings.drop(lease)
        self.believed.discard(lease)

    @rule(most=st.integers(1, 3))
    def tell_dropped(self, most):
        dropped = self.holdings.take_dropped(most)
        assert len(dropped) <= most
        assert not self.believed & set(dropped)
        self.telling.append(dropped)

    @precondition(lambda self: self.telling)
    @rule()
    def hear(self):
        """The writer hears of a release, and says so; what it does not hear before the connection breaks is told again."""
        dropped = self.telling.pop(0)
        for lease in dropped:
            self.table.pop(lease, None)
        self.holdings.released(dropped)

    @precondition(lambda self: any(kind == "view" for *_, kind in self.table.values()))
    @rule(data=st.data())
    def ask(self, data):
        """The writer asks about a view beyond its time."""
        lease = data.draw(st.sampled_from(sorted(one for one, (*_, kind) in self.table.items() if kind == "view")))
        self.holdings.asked((lease,))
        if lease not in self.believed and lease in {one[0] for one in self.granted}:
            self.asked.add(lease)

    def teardown(self):
        """In the end the writer knows no lease but those that the reader believes to hold, and answers on their way."""
        if not hasattr(self, "holdings"):
            return
        while self.telling:
            self.hear()
        for lease in sorted(self.table):
            self.holdings.asked((lease,))
        while dropped := self.holdings.take_dropped(3):
            for lease in dropped:
                self.table.pop(lease, None)
            self.holdings.released(dropped)
        assert self.table.keys() <= self.believed, "a lease is left that nobody holds"

    @rule(most=st.integers(1, 3), seconds=st.floats(0, 40))
    def renew(self, most, seconds):
        self.now += seconds
        due = self.holdings.due(self.now, most)
        assert len(due) <= most
        lost = frozenset(lease for lease in due if lease not in self.table)
        self.holdings.renewed(due, lost, self.now)
        for lease in lost & self.believed:
            assert self.holdings.lost(lease, self.now)
        for lease in (set(due) - lost) & self.believed:
            assert not self.holdings.lost(lease, self.now + SECONDS), "renewed, and over before its time"
        self.believed -= lost

    @precondition(lambda self: self.table)
    @rule(data=st.data())
    def revoke(self, data):
        """The writer ends a lease by time, and says so at the next renewal."""
        self.table.pop(data.draw(st.sampled_from(sorted(self.table))), None)

    @precondition(lambda self: self.believed)
    @rule(data=st.data(), kind=KINDS)
    def upgrade(self, data, kind):
        lease = data.draw(st.sampled_from(sorted(self.believed)))
        if lease in self.table:
            slot, generation, _ = self.table[lease]
            self.table[lease] = slot, generation, kind
            self.holdings.changed(lease, kind)

    @rule()
    def replace_writer(self):
        self.connect(int(self.life.epoch, 16), self.life.incarnation + 1)

    @rule()
    def start_cold(self):
        self.connect(int(self.life.epoch, 16) + 1, self.life.incarnation + 1)

    @rule()
    def connect_again(self):
        self.connect(int(self.life.epoch, 16), self.life.incarnation)

    @invariant()
    def holds(self):
        if hasattr(self, "holdings"):
            self.holdings.validate()
            assert len(self.holdings) >= len(self.believed)


TestHoldingsMachine = HoldingsMachine.TestCase
TestHoldingsMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def adopted(holdings, lease):
    return holdings.adopt(lease, 0, 1, "view", epoch="0" * 32, sent_at=0.0)


def test_an_address_that_is_opened_twice_is_released_with_the_second():
    holdings, lease = Holdings(), lease_id(1, bytes(12))
    holdings.welcomed(Life("0" * 32, 1), SECONDS)
    assert adopted(holdings, lease)
    assert adopted(holdings, lease)
    holdings.drop(lease)
    assert holdings.take_dropped(9) == ()
    assert not holdings.lost(lease, 0.0)
    holdings.drop(lease)
    assert holdings.take_dropped(9) == (lease,)
    assert holdings.lost(lease, 0.0)


def test_a_lease_that_was_released_or_lost_is_not_taken_up_again():
    holdings = Holdings()
    holdings.welcomed(Life("0" * 32, 1), SECONDS)
    released, lost = lease_id(1, b"released----"), lease_id(1, b"lost--------")
    holdings.drop(released)  # as by Backend.release, of an address that was never opened
    assert holdings.take_dropped(9) == (released,)
    assert adopted(holdings, lost)
    holdings.renewed((lost,), frozenset([lost]), 0.0)
    assert not adopted(holdings, released)
    assert not adopted(holdings, lost)
