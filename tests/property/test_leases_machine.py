"""The lease table against a model that is a plain dictionary and looks at every lease on every tick."""

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.machines import at_length

from mmprep_worker.ring.leases import Leases, Overdue

OWNERS = ["engine-0", "engine-1", "engine-2"]
ids = st.integers(0, 11).map(lambda n: bytes([n]) * 16)
owners = st.sampled_from(OWNERS)
kinds = st.sampled_from(["copy", "view"])
seconds = st.integers(1, 8)


class LeasesMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.leases = Leases()
        self.now = 0.0
        self.model = {}  # id: dict
        self.revoked = 0

    def mine(self, owner, lease_id):
        lease = self.model.get(lease_id)
        return lease if lease is not None and lease["owner"] == owner else None

    def extend(self, lease, length):
        lease["deadline"] = max(lease["deadline"], self.now + length)
        lease["overdue"] = False

    @rule(lease_id=ids, owner=owners, slot=st.integers(0, 3), kind=kinds, length=seconds)
    def deliver(self, lease_id, owner, slot, kind, length):
        known = self.model.get(lease_id)
        same = known is not None and (known["owner"], known["slot"], known["kind"]) == (owner, slot, kind)
        try:
            new = self.leases.deliver(lease_id, owner, slot, 64 << slot, kind, now=self.now, seconds=length)
        except ValueError:
            assert known is not None
            assert not same
            return
        assert new == (known is None)
        if same:
            self.extend(known, length)
        else:
            assert known is None, "an id was taken from its lease"
            self.model[lease_id] = {
                "owner": owner,
                "slot": slot,
                "kind": kind,
                "deadline": self.now + length,
                "overdue": False,
            }

    @rule(owner=owners, some=st.lists(ids, max_size=4), length=seconds)
    def renew(self, owner, some, length):
        answer = self.leases.renew(owner, some, self.now, length)
        assert answer == {lease_id: self.mine(owner, lease_id) is not None for lease_id in some}
        for lease_id in some:
            if answer[lease_id]:
                self.extend(self.model[lease_id], length)

    @rule(owner=owners, some=st.lists(ids, max_size=4))
    def release(self, owner, some):
        slots, unknown = self.leases.release(owner, some)
        expected, strange = [], []
        for lease_id in some:
            if self.mine(owner, lease_id) is None:
                strange.append(lease_id)
            else:
                expected.append(self.model.pop(lease_id)["slot"])
        assert (slots, unknown) == (expected, strange)

    @rule(owner=owners, lease_id=ids, kind=kinds)
    def change_kind(self, owner, lease_id, kind):
        lease = self.mine(owner, lease_id)
        assert self.leases.upgrade(owner, lease_id, kind) == (lease is not None)
        if lease is not None:
            lease["kind"] = kind
            lease["overdue"] = lease["overdue"] and kind == "view"

    @rule(owner=owners)
    def owner_gone(self, owner):
        ended = [lease_id for lease_id, lease in self.model.items() if lease["owner"] == owner]
        expected = sorted(self.model.pop(lease_id)["slot"] for lease_id in ended)
        assert sorted(self.leases.owner_gone(owner)) == expected

    @rule(step=st.integers(0, 6))
    def tick(self, step):
        self.now += step
        revoked = {lease.lease_id for lease in self.leases.tick(self.now)}
        late = {lease_id for lease_id, lease in self.model.items() if lease["deadline"] <= self.now}
        assert revoked == {lease_id for lease_id in late if self.model[lease_id]["kind"] == "copy"}
        for lease_id in late:
            if lease_id in revoked:
                del self.model[lease_id]
            else:
                self.model[lease_id]["overdue"] = True
        self.revoked += len(revoked)

    @rule()
    def ask_when_to_tick(self):
        pending = [lease["deadline"] for lease in self.model.values() if not lease["overdue"]]
        assert self.leases.next_deadline() == min(pending, default=None)

    @invariant()
    def the_table_is_the_models(self):
        self.leases.validate()
        for lease_id, lease in self.model.items():
            held = self.leases.get(lease_id)
            assert held is not None
            assert {name: getattr(held, name) for name in lease} == lease
        assert len(self.leases) == len(self.model)
        assert self.leases.revoked_count == self.revoked

    @invariant()
    def overdue_views_are_counted_against_their_owner(self):
        for owner in OWNERS:
            mine = [lease for lease in self.model.values() if lease["owner"] == owner]
            late = [64 << lease["slot"] for lease in mine if lease["overdue"]]
            assert self.leases.count(owner) == len(mine)
            assert self.leases.overdue(owner) == Overdue(len(late), sum(late))
            assert self.leases.quarantined(owner, 128) == (sum(late) > 128)


TestLeasesMachine = LeasesMachine.TestCase
TestLeasesMachine.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
TestLeasesMachineAtLength = at_length(LeasesMachine)
