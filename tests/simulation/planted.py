"""Bugs that are planted to see that the simulation finds them: name to settings."""

from __future__ import annotations

from mmprep.holdings import Holdings
from mmprep.wire import messages
from mmprep_frontend.offers import Offers
from mmprep_worker.writer.core import WriterCore


class AnswersTwice(WriterCore):
    def _send(self, peer, message, frames=()):
        super()._send(peer, message, frames)
        if isinstance(message, messages.Answer):
            super()._send(peer, message, frames)


class ForgetsReassert(WriterCore):
    def _from_peer(self, peer, message, now):
        if isinstance(message, messages.Reassert):
            message = messages.Reassert(message.call, (), message.last)
        super()._from_peer(peer, message, now)


class WaitsForNobody(WriterCore):
    def __init__(self, **arguments):
        super().__init__(**{**arguments, "awaited": ()})


class EndsOverdueViews(WriterCore):
    def tick(self, now):
        super().tick(now)
        for lease in list(self.ring.leases):
            if lease.overdue:
                self.ring.release(lease.owner, [lease.lease_id])


class NeverUnpins(WriterCore):
    def _unpin(self, peer, number):
        pass


class ForgetsLatePeers(WriterCore):
    """Takes silence for death: what a lost connection held is released."""

    def unreachable(self, identity, now):
        peer = self.peers.get(identity)
        super().unreachable(identity, now)
        if peer is not None and peer.role == "backend":
            self.ring.owner_gone(peer.id)


class KeepsNobodysCalls(WriterCore):
    """Forgets to answer the calls whose flight failed."""

    def _expire(self, action):
        pending = self._calls.get(action.call)
        if pending is not None:
            self._drop(pending)


class TellsNothing(Holdings):
    def welcomed(self, life, seconds):
        super().welcomed(life, seconds)
        return ()


class AdoptsEverything(Holdings):
    def adopt(self, lease, *rest, **more):
        good = super().adopt(lease, *rest, **more)
        if not good and self.life is not None and self.life.epoch == more["epoch"]:
            self.life, life = self.life._replace(incarnation=0), self.life
            good = super().adopt(lease, *rest, **more)
            self.life = life
        return good


class ForgetsOffers(Offers):
    def _make_again(self, offer, now):
        return [] if offer.number else super()._make_again(offer, now)


def exit_is_not_awaited(writer, number):
    """A lane that was told to die counts as gone at once."""
    lane = writer.lanes.get(number)
    if lane is not None:
        lane.kill()
        writer.core.lane_exited(number, writer.clock())
        del writer.lanes[number]
        writer._warm.pop(lane, None)
        writer._start_at[number] = writer.clock() + 1.0


def with_holdings(kind):
    def spoil(registration):
        registration._holdings = kind()

    return spoil


def with_offers(kind):
    def spoil(link):
        link._offers = kind()

    return spoil


def unchecked(link):
    """Nobody looks, after reading what was pinned, whether it still is."""
    link.checks_nothing = True


BUGS = {
    "an answer is sent twice": {"core": AnswersTwice},
    "re-asserted leases are forgotten": {"core": ForgetsReassert},
    "a new writer grants before the readers have spoken": {"core": WaitsForNobody},
    "views end when they are overdue": {"core": EndsOverdueViews},
    "pins never end": {"core": NeverUnpins},
    "a lost connection is taken for a death": {"core": ForgetsLatePeers},
    "a call that is late gets no answer": {"core": KeepsNobodysCalls},
    "a killed lane's extent is free before it is gone": {"on_kill": exit_is_not_awaited},
    "a backend does not tell the next writer what it holds": {"spoil_backend": with_holdings(TellsNothing)},
    "a backend believes in leases of an earlier writer": {"spoil_backend": with_holdings(AdoptsEverything)},
    "a frontend does not offer again": {"spoil_frontend": with_offers(ForgetsOffers)},
    "pinned bytes are not checked after reading": {"spoil_frontend": unchecked},
}
