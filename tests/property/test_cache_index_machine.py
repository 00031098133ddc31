"""The disk cache's index against a model that keeps a plain list, least recently used first."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.machines import at_length

from mmprep_frontend.media.cache_index import BLOCK, Index, Kept
from mmprep_frontend.media.storing import Validators

BLOCKS, TTL = 6, 10.0
KEYS = st.sampled_from([bytes([number]) * 32 for number in range(5)])


def blocks(kept):
    return -(-kept.nbytes // BLOCK)


class CacheIndexMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now = 1000.0
        self.db = sqlite3.connect(":memory:")
        self.open(BLOCKS)
        self.model: list[Kept] = []
        self.made = 0

    def open(self, limit):
        self.limit = limit
        self.index = Index(self.db, max_bytes=limit * BLOCK, ttl=TTL)
        self.index.prepare()

    def teardown(self):
        self.db.close()

    def known(self, key):
        return next((kept for kept in self.model if kept.key == key), None)

    def make_room(self, room):
        gone = []
        while sum(map(blocks, self.model)) > room:
            gone.append(self.model.pop(0).name)
        return gone

    @rule(seconds=st.sampled_from([1.0, 4.0, TTL, -5.0]))
    def pass_time(self, seconds):
        self.now += seconds

    @rule(key=KEYS, nbytes=st.integers(1, 7 * BLOCK), ask=st.booleans(), tagged=st.booleans(), ago=st.integers(0, 12))
    def put(self, key, nbytes, ask, tagged, ago):
        self.made += 1
        tag = Validators('"a"' if tagged else "")
        times = {"written": self.now, "used": self.now}
        kept = Kept(key, nbytes, "blake3", bytes(32), ("http://a/",), key, ask, tag, ask, f"n{self.made}", **times)
        change = self.index.put(kept, fetched=self.now - ago, now=self.now)
        known = self.known(key)
        late = known is not None and self.now - ago <= known.written <= self.now
        assert change.kept == (not late and blocks(kept) <= self.limit)
        if not change.kept:
            assert (change.gone, change.evicted) == ((kept.name,), 0)
            return
        replaced = [known.name] if known else []
        self.model = [other for other in self.model if other != known]
        victims = self.make_room(self.limit - blocks(kept))
        assert (list(change.gone), change.evicted) == (replaced + victims, len(victims))
        self.model.append(kept)

    @rule(keys=st.lists(KEYS, max_size=3))
    def touch(self, keys):
        names = [kept.name for kept in map(self.known, keys) if kept] + ["unknown"]
        self.index.touch(names, self.now)
        for name in names:
            used = [replace(kept, used=self.now) for kept in self.model if kept.name == name]
            self.model = [kept for kept in self.model if kept.name != name] + used

    @rule(key=KEYS, ask=st.booleans(), tag=st.sampled_from(["", '"b"']))
    def renew(self, key, ask, tag):
        known = self.known(key)
        self.index.renew(known.name if known else "unknown", Validators(tag), ask=ask, now=self.now)
        renewed = known and replace(known, validators=Validators(tag), ask=ask, written=self.now)
        self.model = [renewed if kept is known else kept for kept in self.model]

    @rule(key=KEYS)
    def drop(self, key):
        known = self.known(key)
        assert self.index.drop([known.name if known else "unknown"]) == ([known.name] if known else [])
        self.model = [kept for kept in self.model if kept is not known]

    @rule()
    def drop_dead(self):
        dead = [k for k in self.model if not (k.validators or 0 <= self.now - k.written < TTL)]
        self.model = [kept for kept in self.model if kept not in dead]
        gone = self.index.drop_dead(self.now)
        assert sorted(gone) == sorted([kept.name for kept in dead] + self.make_room(self.limit))

    @rule(limit=st.integers(3, BLOCKS))
    def open_anew_with_another_limit(self, limit):
        self.open(limit)
        self.drop_dead()

    @invariant()
    def it_says_what_the_model_says(self):
        assert {kept.name for kept in self.model} == self.index.names()
        assert self.index.nbytes() == sum(map(blocks, self.model)) * BLOCK <= self.limit * BLOCK
        for kept in self.model:
            found = self.index.find(kept.key)
            assert found == kept
            assert self.index.knows(kept.name)
            age = self.now - kept.written
            assert found.is_fresh(self.now, TTL) == (not kept.ask and 0 <= age < TTL)
        assert not self.index.knows("unknown")


TestCacheIndexMachine = CacheIndexMachine.TestCase
TestCacheIndexMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, print_blob=True)
TestCacheIndexMachineAtLength = at_length(CacheIndexMachine)
