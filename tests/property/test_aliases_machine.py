"""The writer's aliases against a list, least recently used first."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.machines import at_length

from mmprep.keys import item_key
from mmprep.wire.messages import Alias, Offered, Recalled, Remembered
from mmprep_worker.writer.aliases import Aliases

VARIANT = b"v" * 32
ALIASES = st.sampled_from([bytes([number]) * 32 for number in range(8)])
DIGESTS = st.sampled_from([bytes([100 + number]) * 32 for number in range(3)])
ITEMS = st.one_of(
    st.builds(Offered, st.just(bytes(32)), st.just("image"), st.just(1), st.just(1)),
    st.builds(
        Offered, st.just(bytes(32)), st.just("image"), st.just(1), st.just(1), st.builds(Alias, ALIASES, DIGESTS)
    ),
    st.builds(Recalled, ALIASES, DIGESTS, st.just("image")),
)


class AliasesMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.limit = 1
        self.aliases = Aliases(1)
        self.model: list[tuple[bytes, bytes]] = []

    @initialize(limit=st.integers(1, 6))
    def start(self, limit):
        self.limit = limit
        self.aliases = Aliases(limit)

    def use(self, alias, digest):
        self.model = [entry for entry in self.model if entry[0] != alias]
        if digest is not None:
            self.model = [*self.model, (alias, digest)][-self.limit :]

    @rule(alias=ALIASES)
    def get(self, alias):
        expected = dict(self.model).get(alias)
        assert self.aliases.get(alias) == expected
        self.use(alias, expected)

    @rule(alias=ALIASES, digest=DIGESTS)
    def point(self, alias, digest):
        self.aliases.point(alias, digest)
        self.use(alias, digest)

    @rule(items=st.lists(ITEMS, max_size=5))
    def note(self, items):
        self.aliases.note(items)
        for item in items:
            if isinstance(item, Offered) and item.alias is not None:
                self.use(item.alias.id, item.alias.digest)

    @rule(aliases=st.lists(ALIASES, max_size=3), digests=st.lists(DIGESTS, min_size=3, max_size=3), sent=ITEMS)
    def see_whether_what_is_remembered_is_so(self, aliases, digests, sent):
        remembered = [
            Remembered(alias, VARIANT, "image", item_key(VARIANT, digest))
            for alias, digest in zip(aliases, digests, strict=False)
        ]
        expected = True
        for alias, digest in zip(aliases, digests, strict=False):
            found = dict(self.model).get(alias)
            self.use(alias, found)
            if found != digest:
                expected = False
                break
        items = [*remembered, sent] if isinstance(sent, Offered) else remembered
        assert self.aliases.lead_to(items) == expected

    @rule()
    def clear(self):
        self.aliases.clear()
        self.model = []

    @invariant()
    def it_remembers_what_the_model_does(self):
        self.aliases.validate()
        assert len(self.aliases) == len(self.model)
        assert list(self.aliases._digests.items()) == self.model


TestAliasesMachine = AliasesMachine.TestCase
TestAliasesMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, print_blob=True)
TestAliasesMachineAtLength = at_length(AliasesMachine)
