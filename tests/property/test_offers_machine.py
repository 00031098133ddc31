"""A frontend's offers against writers that come and go: one outcome an offer, and every pin is known to the writer."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmprep.errors import Busy, ServiceUnavailable
from mmprep.holdings import Life
from mmprep.wire import messages
from mmprep_frontend.offers import MOST_RESENDS, Offers, Put, Say, Settle, Terms

ITEMS = st.integers(1, 3)


class OffersMachine(RuleBasedStateMachine):
    """The model: a writer that knows of offers without an answer (``asked``), and of pins (``pinned``), by number."""

    @initialize()
    def begin(self):
        self.offers = Offers()
        self.now = 0.0
        self.life = None
        self.generation = 0
        self.asked = {}
        self.pinned = {}
        self.leases = {}
        self.expected = {}
        self.outcomes = {}
        self.epochs = {}
        self.wire = []

    # --- the writer -----------------------------------------------------------------------------------------------

    def carry_out(self, actions):
        for action in actions:
            match action:
                case Settle(token=token):
                    assert token not in self.outcomes, "two outcomes of one offer"
                    assert token in self.expected, "an outcome that nobody waits for"
                    self.outcomes[token] = action.outcome
                    self.epochs[token] = self.life.epoch
                case Say():
                    assert self.offers.up, "something is said to nobody"
                    self.hear(action.message)
                case Put():
                    assert action.position < self.expected[action.token]

    def hear(self, message):
        match message:
            case messages.Reassert():
                self.heard_all = True
                return
            case messages.Repin():
                assert not self.heard_all, "a pin is told after it was said that this was all"
                self.pinned[message.call] = dict(message.places)
                return
        assert self.heard_all, "something else comes before what is held"
        match message:
            case messages.Offer():
                assert message.call not in self.asked
                assert message.call not in self.pinned
                self.asked[message.call] = message
            case messages.Cancel() | messages.Unpin():
                self.asked.pop(message.call, None)
                self.pinned.pop(message.call, None)
            case messages.Release():
                for lease in message.leases:
                    del self.leases[lease]

    def answer(self, number):
        offer = self.asked.pop(number)
        items = []
        for _ in offer.items:
            self.generation += 1
            lease = None
            if offer.lease is not None:
                lease = self.generation.to_bytes(16, "big")
                self.leases[lease] = number
            length = 64 if offer.need == "tensors" else 0
            items.append(messages.ItemAnswer("hit", self.generation, 0, length, self.generation, lease))
        if offer.lease is None and offer.need == "tensors":
            self.pinned[number] = {item.slot: item.generation for item in items}
        leased_to = None if offer.lease is None else offer.lease.backend
        return messages.Answer(number, 1000, leased_to), items

    # --- rules ----------------------------------------------------------------------------------------------------

    @rule(items=ITEMS, need=st.sampled_from(["tensors", "plan"]), leased=st.booleans(), recalled=st.integers(0, 3))
    def offer(self, items, need, leased, recalled):
        lease = messages.LeaseTo("engine", "copy") if leased and need == "tensors" else None
        sent, unsent = messages.Offered(bytes(32), "image", 1, 1), messages.Recalled(bytes(32), bytes(32), "image")
        offered = tuple(unsent if index == recalled else sent for index in range(items))
        token, actions = self.offers.offer(Terms(offered, need, 0, lease, self.now + 10), self.now)
        self.expected[token] = items
        self.carry_out(actions)

    def waiting(self):
        return sorted(self.expected.keys() - self.outcomes.keys())

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def cancel(self, data):
        token = data.draw(st.sampled_from(self.waiting()))
        del self.expected[token]
        self.carry_out(self.offers.cancel(token))

    @precondition(lambda self: self.outcomes)
    @rule(data=st.data())
    def release(self, data):
        token = data.draw(st.sampled_from(sorted(self.outcomes)))
        outcome = self.outcomes.pop(token)
        del self.expected[token]
        self.carry_out(self.offers.release(token))
        self.carry_out(self.offers.release(token))
        if not isinstance(outcome, Exception):
            for item in outcome[1]:
                self.leases.pop(item.lease, None)

    @precondition(lambda self: self.offers.up and self.asked)
    @rule(data=st.data())
    def want(self, data):
        number = data.draw(st.sampled_from(sorted(self.asked)))
        items = self.asked[number].items
        puts = self.offers.wanted(messages.Wants(number, tuple(messages.Want(n, 1) for n in range(len(items) + 1))))
        sent = [n for n, item in enumerate(items) if isinstance(item, messages.Offered)]
        assert [put.position for put in puts] == sent, "other media are put than those that were offered"
        self.carry_out(puts)

    @precondition(lambda self: self.offers.up and self.asked)
    @rule(data=st.data(), late=st.booleans())
    def send_answer(self, data, late):
        """The writer answers; the answer is delivered at once, or after other things have happened."""
        answer = self.answer(data.draw(st.sampled_from(sorted(self.asked))))
        if late:
            self.wire.append(answer)
        else:
            self.carry_out(self.offers.answered(*answer))

    @precondition(lambda self: self.offers.up and self.wire)
    @rule()
    def deliver(self):
        self.carry_out(self.offers.answered(*self.wire.pop(0)))

    @precondition(lambda self: self.offers.up and self.asked)
    @rule(data=st.data())
    def fail(self, data):
        number = data.draw(st.sampled_from(sorted(self.asked)))
        del self.asked[number]
        self.carry_out(self.offers.failed(number, Busy("full")))

    @precondition(lambda self: self.offers.up)
    @rule()
    def go_down(self):
        """The connection breaks; what was on it is lost."""
        self.offers.down()
        for answer, items in self.wire:
            self.pinned.pop(answer.call, None)
            for item in items:
                self.leases.pop(item.lease, None)
        self.wire.clear()

    @precondition(lambda self: not self.offers.up)
    @rule(cold=st.booleans())
    def come_up(self, cold):
        """A new writer knows nothing of what was asked of the one before."""
        epoch = 1 if self.life is None else int(self.life.epoch, 16) + cold
        self.life = Life(f"{epoch:032x}", 1 if self.life is None else self.life.incarnation + 1)
        self.asked, self.pinned, self.heard_all = {}, {}, False
        self.carry_out(self.offers.welcomed(self.life, self.now))
        assert self.heard_all
        told = {place for places in self.pinned.values() for place in places.items()}
        held = set()
        for token, outcome in self.outcomes.items():
            answered = not isinstance(outcome, Exception)
            if answered and outcome[0].leased_to is None and self.epochs[token] == self.life.epoch:
                held |= {(item.slot, item.generation) for item in outcome[1] if item.length}
        assert told == held, "the writer was told of other pins than there are"

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def every_offer_is_known(self):
        if not hasattr(self, "offers"):
            return
        self.offers.validate()
        if self.offers.up:
            on_their_way = len(self.wire)
            assert len(self.asked) + on_their_way >= len(self.waiting()), "an offer waits for nothing"

    def teardown(self):
        if not hasattr(self, "offers"):
            return
        if not self.offers.up:
            self.come_up(cold=False)
        while self.wire:
            self.carry_out(self.offers.answered(*self.wire.pop(0)))
        for number in sorted(self.asked):
            self.carry_out(self.offers.answered(*self.answer(number)))
        assert not self.waiting(), "an offer has no outcome though the writer answered everything"
        for token in list(self.outcomes):
            outcome = self.outcomes.pop(token)
            self.carry_out(self.offers.release(token))
            if not isinstance(outcome, Exception):
                for item in outcome[1]:
                    self.leases.pop(item.lease, None)
        assert not self.pinned, "pins are left at the writer"
        assert not self.leases, "leases are left at the writer"
        assert len(self.offers) == 0


TestOffersMachine = OffersMachine.TestCase
TestOffersMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_leases_are_given_back_until_the_writer_has_heard_it_and_not_to_the_next_one():
    offers = Offers()
    life = Life("0" * 32, 1)
    offers.welcomed(life, 0.0)
    (said,) = offers.give_back("engine", (b"1" * 16,))
    (heard,) = offers.give_back("engine", (b"2" * 16,))
    offers.heard(heard.message.call)
    offers.down()
    assert offers.give_back("engine", (b"3" * 16,)) == []
    again = [action for action in offers.welcomed(life, 0.0) if isinstance(action.message, messages.Release)]
    assert again[0] == said
    assert [action.message.leases for action in again] == [(b"1" * 16,), (b"3" * 16,)]
    offers.down()
    assert offers.welcomed(life._replace(incarnation=2), 0.0) == [Say(messages.Reassert(0, (), True))]


def test_an_offer_that_brings_writers_down_is_given_up():
    offers = Offers()
    item = messages.Offered(bytes(32), "image", 1, 1)
    token, actions = offers.offer(Terms((item,), "tensors", 0, None, 100.0), 0.0)
    assert actions == []
    settled = []
    for incarnation in range(1, MOST_RESENDS + 3):
        settled += [a for a in offers.welcomed(Life("0" * 32, incarnation), 0.0) if isinstance(a, Settle)]
        offers.down()
    assert [(action.token, type(action.outcome)) for action in settled] == [(token, ServiceUnavailable)]
    assert len(offers) == 0
