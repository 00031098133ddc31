"""Jobs among everything that the writer's core goes through: made of what frontends remember, pulled, ended, or lost.

To the machine of the core come frontends that post without an offer, of places that were right once or never were, and
backends that pull. What a job was posted with must be readable for as long as the job is there, and so must what a backend
was given with it; a job whose items are not where it says leaves nothing behind.
"""

from __future__ import annotations

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from tests.property.test_writer_core_machine import (
    ALIASES,
    BACKENDS,
    GEOMETRY,
    INLINE_BYTES,
    MEDIA,
    NAMED,
    PICK,
    SPILL_BYTES,
    VARIANT,
    Terms,
    WriterCoreMachine,
)

from mmprep.keys import item_key
from mmprep.layout import State
from mmprep.wire import messages
from mmprep_worker.ring.spills import Spill

QUEUE = "q"
#: A queue takes these, one or two at a time.
SMALL = [MEDIA[0], MEDIA[1], MEDIA[5]]
BY_KEY = {medium.key: medium for medium in MEDIA}


class WriterQueuesMachine(WriterCoreMachine):
    def __init__(self):
        super().__init__()
        #: Places by key, as some answer or a look at the ring has told them.
        self.remembered = {}
        #: What each job was posted with: its places and their media.
        self.posted = {}
        #: Deliveries that no backend has ended, by token: whose they are.
        self.delivered = {}
        self.outcome = None
        #: Backends whose connection was lost: what was sent on it is theirs as long as their process lives.
        self.cut_off = set()

    @initialize(spill=st.sampled_from([0, *SPILL_BYTES]), inline=st.sampled_from([0, *INLINE_BYTES]))
    def set_up(self, spill, inline):
        super().set_up(True, spill, inline)
        self.ask(self.current("backend", BACKENDS[0]), messages.Pull, (QUEUE,), 1)

    # -- Frontends ---------------------------------------------------------------------------------------------------

    @rule()
    def places_are_remembered(self):
        for entry in (*self.core.ring._directory, *self.core.ring.spills):
            if entry.state is State.READY:
                self.remembered[entry.key] = 0 if isinstance(entry, Spill) else entry.slot, entry.generation

    @precondition(lambda self: self.living("frontend"))
    @rule(
        pick=PICK,
        media=st.lists(st.sampled_from(SMALL), min_size=1, max_size=2),
        jobs=st.integers(1, 3),
        names=st.none() | st.permutations(ALIASES),
        exchanged=st.booleans(),
        need=st.sampled_from(["tensors", "tensors", "plan"]),
    )
    def post_what_was_just_computed(self, *, pick, media, jobs, names, exchanged, need):
        """By its names alone, where it has some; wrongly, where they are exchanged."""
        connection = self.choose(self.living("frontend"), pick)
        given = [None] * len(media) if names is None else names[: len(media)]
        self.make_offer(connection, media, Terms("tensors", None, 20, 0, 0), given)
        self.work_goes_on(2)
        self.let_go(connection)
        for number in range(jobs):
            if connection.open:
                self.post_without_an_offer(
                    pick=pick,
                    media=media,
                    need=need,
                    aliases=given[::-1] if exchanged else given,
                    alone=[True] * len(media),
                    look=not number,
                    again=False,
                    seconds=20,
                )

    @precondition(lambda self: self.living("frontend"))
    @rule(
        pick=PICK,
        media=st.lists(st.sampled_from(MEDIA), min_size=1, max_size=3),
        need=st.sampled_from(["tensors", "tensors", "plan"]),
        aliases=st.lists(st.none() | st.sampled_from(ALIASES), min_size=3, max_size=3),
        alone=st.lists(st.booleans(), min_size=3, max_size=3),
        look=st.booleans(),
        again=st.booleans(),
        seconds=st.sampled_from([2, 20]),
    )
    def post_without_an_offer(self, *, pick, media, need, aliases, alone, look, again, seconds):
        """Media whose aliases are ``alone`` are only remembered by them."""
        connection = self.choose(self.living("frontend"), pick)
        if look:
            self.places_are_remembered()
        places = [self.remembered.get(medium.key, (1, 7)) for medium in media] if need == "tensors" else []
        job = f"job-{next(self.numbers)}"
        self.posted[job] = dict(zip((generation for _, generation in places), media, strict=False))
        items = tuple(
            messages.Remembered(item.alias.id, VARIANT, "image", item.key) if item.alias and only else item
            for item, only in zip(self.items(media, Terms(need, None, 1, 0, 0), aliases), alone, strict=False)
        )
        for _ in range(1 + again):
            if not connection.open:
                return
            self.post(connection, job, items, tuple(places), seconds)

    def post(self, connection, job, items, places, seconds):
        holders, jobs = self.core.ring.holders, {known.id for known in self.core.queues.jobs}
        flights = {flight.id for flight in self.core.flights}
        known, there = self.core.queues.knows(job), self.are_there(items, places)
        remembered = [item for item in items if isinstance(item, messages.Remembered)]
        stood = {alias: item_key(VARIANT, digest) for alias, digest in self.core.aliases._digests.items()}
        if any(stood.get(item.alias) != item.key for item in remembered):
            there = False
        last_sent = {alias: medium.key for alias, medium in self.aliases.items()}
        names = {i.alias.id: BY_KEY[i.key] for i in items if isinstance(i, messages.Offered) and i.alias}
        under_way = {flight.key for flight in self.core.flights}
        self.aliases |= names
        self.superseded |= {alias for alias in names if NAMED[ALIASES.index(alias)] not in under_way}
        number = next(self.numbers)
        connection.asked[number] = messages.Post
        post = messages.Post(number, job, QUEUE, connection.id, 0, 1, seconds * 1000, places, items=items)
        self.core.message(connection.identity, post, self.now, [bytes(50)])
        self.outcome = None
        self.carry_out()
        if not connection.open:
            return
        assert number not in connection.asked, "a post was not answered"
        assert {flight.id for flight in self.core.flights} == flights, "a post opened a flight"
        if known:
            assert isinstance(self.outcome, messages.Posted)
        elif there is not None:
            assert there != isinstance(self.outcome, messages.Unlike), "it was not looked where the items are"
        if isinstance(self.outcome, messages.Posted) and not known:
            assert all(last_sent.get(item.alias) == item.key for item in remembered), "a name stands for other content"
        how = (" by places" if places else " by plans") + (" and by aliases" if remembered else "")
        event(type(self.outcome).__name__ + how)
        if not isinstance(self.outcome, messages.Posted):
            assert self.core.ring.holders <= holders, "what was refused holds something"
            assert job in jobs or not self.core.queues.knows(job), "what was refused is there"

    def are_there(self, items, places):
        """Whether each item would be found in one of the places, or, without any, is known; ``None``: not looked into.

        What does not fit into one call's part of the ring is looked for beside it.
        """
        keys = {item.key for item in items}
        spills = {spill.key: spill for spill in self.core.ring.spills if spill.state is State.READY}
        inside = {entry.key: entry for entry in self.core.ring._directory if entry.state is State.READY}
        if not places:
            return all(key in spills or key in inside or self.core.plans.get(key) is not None for key in keys)
        if sum(inside[key].extent for key in keys if key in inside) > GEOMETRY.arena_capacity // 2:
            return None
        found = {key: (inside[key].slot, inside[key].generation) for key in keys if key in inside}
        found |= {key: (0, spills[key].generation) for key in keys if key in spills and key not in inside}
        return {found.get(key) for key in keys} == set(places)

    # -- Backends ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.living("backend"))
    @rule(pick=PICK, credit=st.integers(0, 3))
    def pull(self, pick, credit):
        self.ask(self.choose(self.living("backend"), pick), messages.Pull, (QUEUE,), credit)

    @precondition(lambda self: self.delivered and self.living("backend"))
    @rule(pick=PICK, how=st.sampled_from(["acked", "acked", "failed", "given back"]))
    def end_a_job(self, pick, how):
        token = self.choose(sorted(self.delivered), pick)
        connection = self.current("backend", self.delivered.pop(token))
        if connection is None or not connection.open:
            return
        if how == "acked":
            self.ask(connection, messages.Ack, token)
        else:
            self.ask(connection, messages.GiveBack, token, "it failed" if how == "failed" else None)

    @precondition(lambda self: self.delivered and self.living("backend"))
    @rule(pick=PICK, others=st.booleans())
    def end_all_jobs_of_a_backend(self, pick, others):
        """One that says too much says what it may, too."""
        backend = self.delivered[self.choose(sorted(self.delivered), pick)]
        tokens = sorted(token for token, owner in self.delivered.items() if others or owner == backend)
        foreign = [token for token in tokens if self.delivered[token] != backend]
        for token in tokens:
            if token not in foreign:
                del self.delivered[token]
        connection = self.current("backend", backend)
        if connection is None or not connection.open:
            return
        self.outcome = None
        self.ask(connection, messages.Acks, tuple(tokens))
        if foreign:
            assert set(foreign) <= set(self.outcome.lost)

    def receive(self, connection, message, frames):
        match message:
            case messages.Kept():
                assert connection.asked.pop(message.call) is messages.Acks
                self.outcome = message
            case messages.Delivery():
                self.job_arrives(connection, message)
                if message.done:
                    kind = connection.asked.pop(message.done)
                    assert kind in {messages.Ack, messages.Acks, messages.GiveBack}, "a job answers another call"
            case messages.Finished():
                assert not {job.id for job in self.core.queues.jobs} & set(message.jobs), "a job is told to have ended"
            case messages.Posted() | messages.Unlike():
                assert connection.asked.pop(message.call) is messages.Post
                self.outcome = message
            case _:
                super().receive(connection, message, frames)

    def job_arrives(self, connection, delivery):
        places = self.core.queues.job(delivery.job).content[0]
        assert len(delivery.leases) == len(places)
        for lease, (slot, generation) in zip(delivery.leases, places, strict=True):
            entry = self.core.ring.at(slot, generation)
            spill = entry.epoch if isinstance(entry, Spill) else None
            about = messages.ItemAnswer("hit", slot, entry.offset, entry.length, generation, spill=spill)
            self.leased(lease, connection.id, "view", about, self.posted[delivery.job][generation])
        self.delivered[delivery.token] = connection.id

    # -- What always holds -------------------------------------------------------------------------------------------

    @invariant()
    def what_a_job_was_posted_with_is_there_while_it_is(self):
        for job in self.core.queues.jobs:
            for slot, generation in job.content[0]:
                entry = self.core.ring.at(slot, generation)
                medium = self.posted[job.id][generation]
                if isinstance(entry, Spill):
                    continue  # what is in it is looked at where somebody may read it
                assert self.memory[entry.offset : entry.offset + entry.length] == medium.extent

    def over(self, connection):
        super().over(connection)
        self.cut_off.add(connection.id)

    def end_leases(self, owner):
        super().end_leases(owner)
        self.cut_off.discard(owner)

    @invariant()
    def the_leases_are_those_that_were_answered(self):
        leases = {lease.lease_id: lease.owner for lease in self.core.ring.leases}
        assert self.leases.keys() <= leases.keys()
        for lease, owner in leases.items():
            assert owner in self.cut_off or self.leases[lease][0] == owner

    def teardown(self):
        """Jobs that nobody takes end in their time, and hold nothing then."""
        for token, backend in sorted(self.delivered.items()):
            connection = self.current("backend", backend)
            if connection is not None and connection.open:
                self.ask(connection, messages.Ack, token)
        for _ in range(2):
            self.time_passes(100)
        assert not len(self.core.queues)
        super().teardown()


WriterQueuesMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None, database=None)
TestWriterQueuesMachine = WriterQueuesMachine.TestCase
