"""The allocator against a model that paints every 64-byte unit with the extent that has it."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.machines import at_length

from mmprep.arena import Arena, Verdict

UNIT = 64
UNITS = 40


class ArenaMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.arena = Arena(UNITS * UNIT)
        self.lengths = {}  # offset: length
        self.held = set()
        self.marked = set()
        self.asked = {}

    def verdict(self, offset):
        assert offset in self.lengths, "asked about an extent that does not exist"
        if offset in self.held:
            answer = Verdict.KEEP
        elif offset in self.marked:
            self.marked.discard(offset)
            answer = Verdict.SPARE
        else:
            answer = Verdict.EVICT
        self.asked.setdefault(offset, []).append(answer)
        return answer

    def longest_run(self):
        """Bytes of the longest stretch without a held extent."""
        held = [False] * UNITS
        for offset in self.held:
            for unit in range(offset // UNIT, (offset + self.lengths[offset]) // UNIT):
                held[unit] = True
        longest = run = 0
        for unit in held:
            run = 0 if unit else run + 1
            longest = max(longest, run)
        return longest * UNIT

    @rule(nbytes=st.integers(1, UNITS * UNIT), held=st.booleans())
    def allocate_any(self, nbytes, held):
        self.allocate(nbytes, held)

    @rule(nbytes=st.integers(1, 8 * UNIT), held=st.booleans())
    def allocate(self, nbytes, held):
        before = dict(self.lengths)
        fits = self.longest_run() >= -(-nbytes // UNIT) * UNIT
        self.asked = {}
        allocation = self.arena.allocate(nbytes, self.verdict)
        assert (allocation is not None) == fits, "an allocation fails exactly when no run fits"
        if allocation is None:
            assert dict(self.arena.extents()) == before, "a failed allocation changed something"
            return
        assert nbytes <= allocation.length < nbytes + UNIT
        end = allocation.offset + allocation.length
        hit = [o for o, n in sorted(before.items()) if o < end and allocation.offset < o + n]
        assert list(allocation.evicted) == hit, "evicted is what the new extent needs, and nothing else"
        for offset in hit:
            assert self.asked[offset][-1] is Verdict.EVICT
            assert offset not in self.held
            del self.lengths[offset]
        for answers in self.asked.values():
            assert answers.count(Verdict.SPARE) <= 1
        blocks = 2 * len(before) + 1
        assert allocation.steps <= 3 * blocks, "two revolutions, and the run that was open"
        self.marked -= set(hit)
        self.lengths[allocation.offset] = allocation.length
        if held:
            self.held.add(allocation.offset)

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def free(self, data):
        offset = data.draw(st.sampled_from(sorted(self.lengths)))
        self.arena.free(offset)
        del self.lengths[offset]
        self.held.discard(offset)
        self.marked.discard(offset)

    @precondition(lambda self: self.lengths)
    @rule(data=st.data(), what=st.sampled_from(["hold", "let go", "use"]))
    def change_the_verdict(self, data, what):
        offset = data.draw(st.sampled_from(sorted(self.lengths)))
        if what == "hold":
            self.held.add(offset)
        elif what == "let go":
            self.held.discard(offset)
        else:
            self.marked.add(offset)

    @rule(offset=st.integers(-1, UNITS + 1), misalign=st.sampled_from([0, 0, 0, 1]), nbytes=st.integers(0, 9 * UNIT))
    def insert(self, offset, misalign, nbytes):
        start = offset * UNIT + misalign
        length = -(-nbytes // UNIT) * UNIT
        inside = start >= 0 and nbytes > 0 and not misalign and start + length <= UNITS * UNIT
        clear = all(start + length <= o or o + n <= start for o, n in self.lengths.items())
        try:
            self.arena.insert(start, nbytes)
        except ValueError:
            assert not (inside and clear), "a good extent was refused"
        else:
            assert inside, "an extent outside was accepted"
            assert clear, "an overlapping extent was accepted"
            self.lengths[start] = length

    @rule(restart=st.booleans())
    def rebuild(self, restart):
        if restart:
            self.arena = Arena(UNITS * UNIT)
            for offset, length in self.lengths.items():
                self.arena.insert(offset, length)

    @invariant()
    def extents_never_overlap_and_add_up(self):
        self.arena.validate()
        assert dict(self.arena.extents()) == self.lengths
        assert self.arena.free_bytes == UNITS * UNIT - sum(self.lengths.values())


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
TestArenaMachineAtLength = at_length(ArenaMachine)
