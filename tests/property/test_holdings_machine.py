"""A reader's leases against writers that come and go: what it believes to hold is held, or it was told otherwise."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmprep.holdings import Holdings, Life
from mmprep.lease_id import lease_id, mark_of

SECONDS = 30.0
SLOTS = st.integers(0, 3)
KINDS = st.sampled_from(["copy", "view"])
MINE, BEFORE = b"this one", b"former 1"


class Forgetful(Holdings):
    """Begins a new turn often."""

    most_over = 2


class HoldingsMachine(RuleBasedStateMachine):
    """The model: each writer's table of leases, and what went between it and the reader, in order."""

    @initialize()
    def begin(self):
        self.holdings = Forgetful(MINE)
        self.now = 100.0
        self.numbers = 0
        self.life = None
        self.turn = 0
        self.table = {}
        self.addresses = []
        self.believed = set()
        self.kinds = {}
        self.over = set()
        self.telling = []
        self.connect(epoch=1, incarnation=1)

    def connect(self, epoch, incarnation):
        former, self.life = self.life, Life(f"{epoch:032x}", incarnation)
        if former is None or former.epoch != self.life.epoch:
            self.believed.clear()
        if former != self.life:
            self.table = {}
        self.turn = self.holdings.turn
        held = self.holdings.welcomed(self.life, SECONDS)
        self.telling.clear()
        assert {one.lease for one in held} == self.believed
        for one in held:
            self.table[one.lease] = (one.slot, one.generation, one.kind)

    def granted(self, instance, slot, kind, turn):
        self.numbers += 1
        random, mark = self.numbers.to_bytes(8, "big"), mark_of(instance, turn)
        lease = lease_id(self.life.incarnation, random, mark=mark, slot=slot, generation=self.numbers, kind=kind)
        self.addresses.append((lease, slot, self.numbers, kind, self.life, self.now))
        return lease

    @rule(slot=SLOTS, kind=KINDS)
    def grant(self, slot, kind):
        """The writer grants a lease; its address is on its way, and may be opened once, again and again, or never."""
        lease = self.granted(MINE, slot, kind, self.turn)
        self.table[lease] = (slot, self.numbers, kind)

    @rule(slot=SLOTS, kind=KINDS)
    def grant_to_the_process_before(self, slot, kind):
        """The writer knew only the process before, and that one's leases ended with it."""
        self.granted(BEFORE, slot, kind, self.turn)

    @precondition(lambda self: self.addresses)
    @rule(data=st.data(), sure=st.booleans())
    def open(self, data, sure):
        """An address arrives, perhaps after another writer has taken over, perhaps not for the first time."""
        over = [address for address in self.addresses if address[0] in self.over and address[4] == self.life]
        lease, slot, number, kind, life, sent_at = data.draw(st.sampled_from([*self.addresses, *4 * over]))
        good = self.holdings.adopt(lease, slot, number, kind, epoch=life.epoch, sent_at=sent_at, sure=sure)
        mark = mark_of(MINE, self.holdings.turn)
        mine = lease_id(life.incarnation, lease[-8:], mark=mark, slot=slot, generation=number, kind=kind)
        assert good == (life == self.life and lease not in self.over | self.believed and lease == mine)
        if good:
            self.believed.add(lease)
            self.kinds[lease] = kind
            if kind == "view":
                assert self.table[lease][:2] == (slot, number), "a view was taken up that the writer does not keep"

    @precondition(lambda self: self.addresses)
    @rule(data=st.data(), sure=st.booleans())
    def open_with_the_lease_of_another(self, data, sure):
        """Somebody has mixed addresses up."""
        lease, slot, number, kind, life, sent_at = data.draw(st.sampled_from(self.addresses))
        wrong = {
            "slot": (slot + 1, number, kind),
            "generation": (slot, number + 1, kind),
            "kind": (slot, number, {"copy": "view", "view": "copy"}[kind]),
        }
        what = data.draw(st.sampled_from(sorted(wrong)))
        assert not self.holdings.adopt(lease, *wrong[what], epoch=life.epoch, sent_at=sent_at, sure=sure)

    @rule(slot=SLOTS, kind=KINDS, over=st.booleans())
    def acquire(self, slot, kind, over):
        """The writer answers this process itself, which perhaps has enough of it at once."""
        self.grant(slot, kind)
        lease, *place, life, sent_at = self.addresses[-1]
        assert self.holdings.acquired(lease, *place, epoch=life.epoch, sent_at=sent_at)
        if over:
            self.holdings.drop(lease)
            self.over.add(lease)
            self.tell_dropped(9)
        else:
            self.believed.add(lease)
            self.kinds[lease] = kind

    @precondition(lambda self: self.believed)
    @rule(data=st.data())
    def drop(self, data):
        lease = data.draw(st.sampled_from(sorted(self.believed)))
        self.holdings.drop(lease)
        self.believed.discard(lease)
        self.over.add(lease)

    @precondition(lambda self: set(self.table) - self.believed)
    @rule(data=st.data())
    def release_without_opening(self, data):
        lease = data.draw(st.sampled_from(sorted(set(self.table) - self.believed)))
        self.holdings.give_up(lease)
        self.over.add(lease)

    @precondition(lambda self: self.believed)
    @rule(data=st.data())
    def release_what_somebody_has_opened(self, data):
        """The address came twice. Who reads a view goes on; a copy's content is checked after it was read."""
        lease = data.draw(st.sampled_from(sorted(self.believed)))
        is_view = self.kinds[lease] == "view"
        self.holdings.give_up(lease)
        if not is_view:
            self.believed.discard(lease)
            self.over.add(lease)
        self.tell_dropped(999)
        assert self.holdings.lost(lease, self.now) != is_view

    @rule(most=st.integers(1, 3))
    def tell_dropped(self, most):
        dropped = self.holdings.take_dropped(most)
        assert len(dropped) <= most
        assert not self.believed & set(dropped)
        self.telling.append(dropped)

    @precondition(lambda self: self.telling)
    @rule()
    def hear(self):
        """The writer hears of a release and of the turn; what it does not hear before the connection breaks is told again."""
        self.turn = self.holdings.turn
        dropped = self.telling.pop(0)
        for lease in dropped:
            self.table.pop(lease, None)
        self.holdings.released(dropped)

    @precondition(lambda self: self.table)
    @rule(data=st.data())
    def ask(self, data):
        """The writer asks about a view beyond its time, or about what a frontend gives back."""
        lease = data.draw(st.sampled_from(sorted(self.table)))
        self.holdings.asked((lease,))
        if lease not in self.believed:
            self.over.add(lease)

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
        self.over |= lost
        self.believed -= lost

    @precondition(lambda self: any(kind == "copy" for *_, kind in self.table.values()))
    @rule(data=st.data())
    def revoke(self, data):
        """The writer ends a copy by time, and says so at the next renewal."""
        copies = sorted(lease for lease, (*_, kind) in self.table.items() if kind == "copy")
        self.table.pop(data.draw(st.sampled_from(copies)))

    @precondition(lambda self: self.believed)
    @rule(data=st.data(), kind=KINDS)
    def upgrade(self, data, kind):
        lease = data.draw(st.sampled_from(sorted(self.believed)))
        if lease in self.table:
            slot, generation, _ = self.table[lease]
            self.table[lease] = slot, generation, kind
            self.holdings.changed(lease, kind)
            self.kinds[lease] = kind

    @rule(which=st.sampled_from(["the same writer", "the same writer", "the next writer", "another segment"]))
    def connect_to(self, which):
        epoch, incarnation = int(self.life.epoch, 16), self.life.incarnation
        self.connect(epoch + (which == "another segment"), incarnation + (which != "the same writer"))

    @invariant()
    def holds(self):
        if hasattr(self, "holdings"):
            self.holdings.validate()
            assert len(self.holdings) >= len(self.believed)


TestHoldingsMachine = HoldingsMachine.TestCase
TestHoldingsMachine.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


def view(number, instance=MINE, turn=0):
    return lease_id(1, number.to_bytes(8, "big"), mark=mark_of(instance, turn), slot=0, generation=1, kind="view")


def adopted(holdings, lease):
    return holdings.adopt(lease, 0, 1, "view", epoch="0" * 32, sent_at=0.0)


@pytest.fixture
def holdings():
    holdings = Holdings(MINE)
    holdings.welcomed(Life("0" * 32, 1), SECONDS)
    return holdings


def test_a_lease_is_taken_up_for_one_item_only(holdings):
    lease = view(0)
    assert adopted(holdings, lease)
    assert not adopted(holdings, lease)
    assert not holdings.lost(lease, 0.0)
    holdings.drop(lease)
    assert holdings.take_dropped(9) == (lease,)
    assert holdings.lost(lease, 0.0)


def test_a_lease_that_was_released_or_lost_is_not_taken_up_again(holdings):
    released, lost = view(1), view(2)
    holdings.drop(released)
    assert holdings.take_dropped(9) == (released,)
    assert adopted(holdings, lost)
    holdings.renewed((lost,), frozenset([lost]), 0.0)
    assert not adopted(holdings, released)
    assert not adopted(holdings, lost)


def test_a_lease_that_is_about_to_be_released_is_not_taken_up_again(holdings):
    unopened, opened = view(1), view(2)
    assert adopted(holdings, opened)
    holdings.give_up(unopened)
    holdings.drop(opened)
    assert not adopted(holdings, unopened)
    assert not adopted(holdings, opened)
    assert set(holdings.take_dropped(9)) == {unopened, opened}


def test_a_view_that_was_taken_up_does_not_end_with_its_address(holdings):
    lease, unread = view(1), view(2)
    assert adopted(holdings, lease)
    holdings.give_up(lease)
    holdings.give_up(unread)
    assert [held.lease for held in holdings.welcomed(Life("0" * 32, 2), SECONDS)] == [lease]
    assert holdings.take_dropped(9) == (unread,)
    assert not holdings.lost(lease, 1e9)
    holdings.changed(lease, "copy")
    holdings.give_up(lease)
    assert holdings.take_dropped(9) == (lease,)


def test_a_lease_of_the_process_before_under_the_same_id_is_not_taken_up(holdings):
    assert not adopted(holdings, view(1, BEFORE))
    assert adopted(holdings, view(1))


def test_a_new_turn_begins_before_anything_is_forgotten(holdings):
    leases = [view(number) for number in range(holdings.most_over + 1)]
    for lease in leases[:-1]:
        holdings.asked((lease,))
    assert holdings.turn == 0
    assert not adopted(holdings, leases[0])
    assert adopted(holdings, leases[-1])
    holdings.renewed((leases[-1],), frozenset(leases[-1:]), 0.0)
    assert holdings.turn == 1
    assert not any(adopted(holdings, lease) for lease in leases)
    assert adopted(holdings, view(0, turn=1))


def test_what_is_held_stays_held_in_the_next_turn(holdings):
    held = view(0)
    assert adopted(holdings, held)
    for number in range(1, holdings.most_over + 2):
        holdings.asked((view(number),))
    assert holdings.turn == 1
    assert not holdings.lost(held, 0.0)
    assert held in {one.lease for one in holdings.welcomed(Life("0" * 32, 2), SECONDS)}
