"""Offers under way with the writer: a pure core of :mod:`mmprep_frontend.dispatch`.

An offer outlives the writer it was made to: it is made again to the next one, under a new number. What an answer pinned
stays pinned until :meth:`Offers.release`, also over the writer's replacement, of which the next writer is told before
anything else. Whoever made an offer gets exactly one outcome, unless he cancels it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from mmprep.errors import MmprepError, ProtocolError, ServiceUnavailable
from mmprep.holdings import Life
from mmprep.wire import messages

#: How often an offer is made again because the writer went away: one that brings it down must not do so for ever.
MOST_RESENDS = 8


class Say(NamedTuple):
    """Send on the control link."""

    message: msgspec.Struct


class Put(NamedTuple):
    """Send the medium of item ``position`` of an offer, under a flight, on the bulk link."""

    token: int
    position: int
    flight: int


class Settle(NamedTuple):
    """The outcome of an offer: an error, or the answer and what it says about each item."""

    token: int
    outcome: MmprepError | tuple[messages.Answer, Sequence[messages.ItemAnswer]]


Action: TypeAlias = Say | Put | Settle


class Terms(NamedTuple):
    """What is offered, and how; ``deadline`` in the caller's seconds, ``traced``: answers are to say when."""

    items: tuple[messages.Item, ...]
    need: messages.Need
    priority: int
    lease: messages.LeaseTo | None
    deadline: float
    traced: bool = False


class _Offer:
    __slots__ = ("number", "pinned", "resends", "terms", "token")

    def __init__(self, token: int, terms: Terms) -> None:
        self.token = token
        self.terms = terms
        self.number = 0
        self.resends = 0
        #: Slots and generations, once answered.
        self.pinned: tuple[tuple[int, int], ...] | None = None


class Offers:
    """The state machine of one frontend. A *token* is an offer's name for its life, a *number* that of one attempt."""

    def __init__(self) -> None:
        self._tokens = 0
        self._numbers = 0
        self._life: Life | None = None
        self._up = False
        self._offers: dict[int, _Offer] = {}
        self._by_number: dict[int, _Offer] = {}
        #: Releases of leases whose holder will never hear of them, until the writer has heard: ``{number: release}``.
        self._given_back: dict[int, messages.Release] = {}

    def __len__(self) -> int:
        return len(self._offers)

    @property
    def up(self) -> bool:
        """Whether a writer has welcomed this frontend."""
        return self._up

    # --- the frontend's events ------------------------------------------------------------------------------------

    def offer(self, terms: Terms, now: float) -> tuple[int, list[Action]]:
        """Offer items; return the offer's token and what is to be done."""
        self._tokens += 1
        offer = self._offers[self._tokens] = _Offer(self._tokens, terms)
        return offer.token, self._make(offer, now) if self._up else []

    def cancel(self, token: int) -> list[Action]:
        """Nobody waits for the offer any more; what has no outcome will get none."""
        offer = self._offers.pop(token, None)
        if offer is None:
            return []
        self._by_number.pop(offer.number, None)
        return [Say(messages.Cancel(offer.number))] if self._up and offer.number else []

    def release(self, token: int) -> list[Action]:
        """Let go of what the offer's answer pinned; again is no error."""
        offer = self._offers.pop(token, None)
        if offer is None:
            return []
        self._by_number.pop(offer.number, None)
        return [Say(messages.Unpin(offer.number))] if self._up else []

    def number(self, token: int) -> int | None:
        """Return the number under which the writer knows what the offer's answer pinned, ``None`` where it pins nothing."""
        offer = self._offers.get(token)
        return None if offer is None or offer.pinned is None else offer.number

    def give_back(self, backend: str, leases: tuple[bytes, ...]) -> list[Action]:
        """End leases of an answer that will not reach anybody; said again where the connection is lost."""
        self._numbers += 1
        release = self._given_back[self._numbers] = messages.Release(self._numbers, leases, backend)
        return [Say(release)] if self._up else []

    # --- the writer's ---------------------------------------------------------------------------------------------

    def welcomed(self, life: Life, now: float) -> list[Action]:
        """A writer has welcomed this frontend: tell it what is pinned, then offer again what has no answer."""
        former, self._life, self._up = self._life, life, True
        actions: list[Action] = []
        for offer in [offer for offer in self._offers.values() if offer.pinned is not None]:
            if former is not None and former.epoch == life.epoch:
                actions.append(Say(messages.Repin(offer.number, offer.pinned or ())))
            else:  # nobody writes to the former segment any more
                self.cancel_silently(offer.token)
        actions.append(Say(messages.Reassert(0, (), True)))
        if former != life:  # the next writer knows no lease but those that its holder tells it of
            self._given_back.clear()
        actions += [Say(release) for release in self._given_back.values()]
        for offer in [offer for offer in self._offers.values() if offer.pinned is None]:
            actions += self._make_again(offer, now)
        return actions

    def down(self) -> None:
        """The connection is gone; nothing is sent until the next welcome."""
        self._up = False

    def wanted(self, wants: messages.Wants) -> list[Action]:
        """The writer asks for media."""
        offer = self._by_number.get(wants.call)
        if offer is None:
            return []
        sent = {index for index, item in enumerate(offer.terms.items) if not isinstance(item, messages.Recalled)}
        return [Put(offer.token, want.index, want.flight) for want in wants.wants if want.index in sent]

    def answered(self, answer: messages.Answer, items: Sequence[messages.ItemAnswer]) -> list[Action]:
        """The one answer to an offer; one that nobody waits for any more is given back."""
        offer = self._by_number.get(answer.call)
        if offer is None or offer.pinned is not None:
            return self._return(answer, items)
        if len(items) != len(offer.terms.items):
            return [*self._return(answer, items), *self._fail(offer, ProtocolError("an answer to other items"))]
        if answer.leased_to is not None and any(item.inline for item in items):
            offer.pinned = ()  # the writer keeps the tensors until they were fetched
        elif answer.leased_to is None and offer.terms.need == "tensors":
            offer.pinned = tuple({(item.slot, item.generation) for item in items if item.length})
        else:
            self.cancel_silently(offer.token)
        return [Settle(offer.token, (answer, items))]

    def failed(self, number: int, error: MmprepError) -> list[Action]:
        """The writer has refused an offer as a whole."""
        self._given_back.pop(number, None)
        offer = self._by_number.get(number)
        return [] if offer is None else self._fail(offer, error)

    def heard(self, number: int) -> None:
        """The writer has done what it was told under this number."""
        self._given_back.pop(number, None)

    def fail_all(self, error: MmprepError) -> list[Action]:
        """End every offer that has no answer."""
        waiting = [offer for offer in self._offers.values() if offer.pinned is None]
        return [action for offer in waiting for action in self._fail(offer, error)]

    # --- steps ----------------------------------------------------------------------------------------------------

    def cancel_silently(self, token: int) -> None:
        """Forget an offer of which the writer need not hear."""
        offer = self._offers.pop(token, None)
        if offer is not None:
            self._by_number.pop(offer.number, None)

    def _make(self, offer: _Offer, now: float) -> list[Action]:
        self._numbers += 1
        offer.number = self._numbers
        self._by_number[offer.number] = offer
        terms = offer.terms
        left = max(1, int((terms.deadline - now) * 1000))
        return [
            Say(messages.Offer(offer.number, terms.need, left, terms.priority, terms.items, terms.lease, terms.traced))
        ]

    def _make_again(self, offer: _Offer, now: float) -> list[Action]:
        if offer.number:
            self._by_number.pop(offer.number, None)
            offer.resends += 1
            if offer.resends > MOST_RESENDS:
                return self._fail(offer, ServiceUnavailable("the worker failed again and again with this request"))
        return self._make(offer, now)

    def _fail(self, offer: _Offer, error: MmprepError) -> list[Action]:
        self.cancel_silently(offer.token)
        return [Settle(offer.token, error)]

    def _return(self, answer: messages.Answer, items: Sequence[messages.ItemAnswer]) -> list[Action]:
        unpin = Say(messages.Unpin(answer.call))
        if answer.leased_to is None:
            return [unpin]
        released = self.give_back(answer.leased_to, tuple(item.lease for item in items if item.lease is not None))
        return [*released, unpin] if any(item.inline for item in items) else released

    def validate(self) -> None:
        """Check the invariants.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        made = {offer.number: offer for offer in self._offers.values() if offer.number}
        assert self._by_number == made, "the index by number differs"
        for token, offer in self._offers.items():
            assert offer.token == token, "an offer is found by another token"
            assert offer.number or not self._up, "an offer was not made though the writer is there"
