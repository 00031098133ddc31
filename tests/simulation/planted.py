"""Bugs that are planted to see that the simulation finds them: name to settings."""

from __future__ import annotations

import asyncio

from tests.simulation.run import SPILL

from mmprep.errors import StaleDelivery
from mmprep.holdings import Holdings
from mmprep.segment import sibling_name
from mmprep.wire import messages
from mmprep_frontend import post_link
from mmprep_frontend.offers import Offers, Settle
from mmprep_frontend.posts import Posts
from mmprep_worker.ring.spills import Spill
from mmprep_worker.writer.core import WriterCore
from mmprep_worker.writer.state import RemoveSegment, Send


class AnswersTwice(WriterCore):
    def take_actions(self):
        actions = []
        for action in super().take_actions():
            twice = isinstance(action, Send) and isinstance(action.message, messages.Answer)
            actions += [action, action] if twice else [action]
        return actions


class ForgetsReassert(WriterCore):
    def _from_peer(self, peer, message, frames, now):
        if isinstance(message, messages.Reassert):
            message = messages.Reassert(message.call, (), message.last)
        super()._from_peer(peer, message, frames, now)


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
    def _from_peer(self, peer, message, frames, now):
        if not isinstance(message, messages.Unpin):
            super()._from_peer(peer, message, frames, now)


class TakesSilenceForDeath(WriterCore):
    """Takes silence for death: what a lost connection held is released."""

    def unreachable(self, identity, now):
        peer = self.peers.get(identity)
        super().unreachable(identity, now)
        if peer is not None and peer.role == "backend":
            self.ring.owner_gone(peer.id)


class NoticesNoDeath(WriterCore):
    def peer_gone(self, role, peer_id, now):
        pass


class EndsWhatIsGivenBack(WriterCore):
    """What a frontend takes for undelivered ends at once, though its backend may have it."""

    def _give_back(self, _, release):
        self.ring.release(release.owner, release.leases)


class IgnoresTheTag(Holdings):
    """Takes a lease for its own that was granted to the process before it under the same id."""

    def adopt(self, *lease, **arguments):
        return self.acquired(*lease, **arguments)


class Forgets(Holdings):
    """Forgets what it has released, and begins no new turn."""

    def _end(self, lease):
        self._held.pop(lease, None)
        self._over = {lease}


class RemovesLeasedSpills(WriterCore):
    """Removes a spill that is leased, and goes on as if it were there."""

    def take_actions(self):
        leased = [spill for spill in self.ring.spills if spill.leases]
        removed = [RemoveSegment(sibling_name(self.segment.name, spill.epoch)) for spill in leased]
        return [*removed, *super().take_actions()]


class PublishesLeavings(WriterCore):
    """Believes that a lane has filled the spill over which it died."""

    def lane_exited(self, number, now):
        lane = self.lanes[number]
        if isinstance(lane.grant, Spill) and not lane.killed:
            self.from_lane(number, messages.Filled(lane.flight, 1, 1), (), now)
        super().lane_exited(number, now)


class KeepsTensorsOfTheCancelled(WriterCore):
    def _from_peer(self, peer, message, frames, now):
        if isinstance(message, messages.Cancel) and (call := peer.calls.get(message.call)) is not None:
            call.transfers.clear()
        super()._from_peer(peer, message, frames, now)


class MixesTensorsUp(WriterCore):
    def tensors(self, number):
        found = super().tensors(number)
        return found and next(transfer.frame for transfer in self.transfers if transfer.frame is not None)


class DeliversTheDoneAgain(WriterCore):
    def _about_jobs(self, peer, message, now):
        if isinstance(message, messages.Ack):
            message = messages.GiveBack(message.call, message.token, None)
        super()._about_jobs(peer, message, now)


class TakesLateWords(WriterCore):
    """Takes what a backend says of a job for good, whoever has the job by now."""

    def _about_jobs(self, peer, message, now):
        try:
            super()._about_jobs(peer, message, now)
        except StaleDelivery:
            self._send(peer, messages.Done(message.call))


class LosesWhatIsGivenBack(WriterCore):
    def _about_jobs(self, peer, message, now):
        if isinstance(message, messages.GiveBack):
            message = messages.Ack(message.call, message.token)
        super()._about_jobs(peer, message, now)


class PostsOnce(Posts):
    """A frontend does not tell the next writer of its jobs."""

    def welcomed(self, now):
        kept, self._jobs = self._jobs, {job_id: kept for job_id, kept in self._jobs.items() if not kept.accepted}
        try:
            return super().welcomed(now)
        finally:
            self._jobs = kept


class NeverSaysThatItFetched(Offers):
    """A frontend does not tell the writer that it has the tensors that came beside leases."""

    def answered(self, answer, items):
        actions = super().answered(answer, items)
        if answer.leased_to is not None:
            for settle in [action for action in actions if isinstance(action, Settle)]:
                self.cancel_silently(settle.token)
        return actions


class TellsNothing(Holdings):
    def welcomed(self, life, seconds):
        super().welcomed(life, seconds)
        return ()


class KeepsPins(Offers):
    def release(self, _):
        return []


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
        registration._holdings = kind(registration._instance)

    return spoil


def with_offers(kind):
    def spoil(link):
        link._offers = kind()

    return spoil


def posts_once(link):
    link.jobs._posts = PostsOnce(1 << 20, first=post_link._FIRST_POST)


def posts_end_pins_of_another_connection(link):
    """Jobs that are posted anew end pins that the writer is told of after them."""
    jobs = link.jobs
    jobs.welcomed = lambda: jobs._carry_out(jobs._posts.welcomed(asyncio.get_running_loop().time()))


def silent_over_lapsed_jobs(pulling):
    """A backend says nothing of a job that has waited in it for longer than its time."""
    pulling._too_late = lambda _: None


def drops_what_is_read(pulling):
    """A backend lets go of a job's tensors when it hears that the job was delivered elsewhere, though it reads them."""

    def kept(done):
        if not done.cancelled() and done.exception() is None:
            for held in [pulling._held[token] for token in done.result().lost if token in pulling._held]:
                held.end = "over"
                pulling._drop(held)

    pulling._kept = kept


def unchecked(registration):
    """A backend does not look, after copying, whether the content is still the same."""
    registration.checks_nothing = True


#: With room beside the ring, for which there is much use.
BESIDE = {"requests": 60, "spill": 2 * SPILL, "inline": 2500, "shortage": 0.0, "large": 0.6, "queue_limit": 32}
#: Many jobs, and little time for each.
JOBS = {"jobs": 60, "requests": 10, "queue_seconds": 1.0, "queue_limit": 32, "arena": 8192, "large": 0.0}
SILENCE = ("stop", "stop", "partition", "break")
RESTARTS = ("crash", "kill", *SILENCE)
#: As much as a small ring can bear, with no room beside it: whatever is free by mistake is soon overwritten.
BUSY = {
    "requests": 90,
    "arena": 4096,
    "slots": 16,
    "spill": 0,
    "inline": 0,
    "large": 0.0,
    "queue_limit": 32,
    "high_water": 1000,
    "lease_seconds": 1.0,
}

BUGS = {
    "an answer is sent twice": {"core": AnswersTwice},
    "re-asserted leases are forgotten": {"core": ForgetsReassert},
    "a new writer grants before the readers have spoken": {"core": WaitsForNobody, "kinds": RESTARTS, **BUSY},
    "views end when they are overdue": {"core": EndsOverdueViews, "kinds": SILENCE, **BUSY},
    "pins never end": {"core": NeverUnpins},
    "a lost connection is taken for a death": {"core": TakesSilenceForDeath, "kinds": SILENCE, **BUSY},
    "the dead are not noticed": {"core": NoticesNoDeath},
    "a killed lane's extent is free before it is gone": {"on_kill": exit_is_not_awaited, **BUSY},
    "a backend does not tell the next writer what it holds": {"spoil_backend": with_holdings(TellsNothing)},
    "a frontend keeps what it has read": {"spoil_frontend": with_offers(KeepsPins)},
    "a backend ignores the tags of leases": {
        "spoil_backend": with_holdings(IgnoresTheTag),
        "kinds": ("replace",),
        **BUSY,
    },
    "a backend takes up again what it has released": {"spoil_backend": with_holdings(Forgets), **BUSY},
    "what is given back ends although its backend has it": {"core": EndsWhatIsGivenBack, **BUSY},
    "a copy is not checked afterwards": {"spoil_backend": unchecked, **BUSY},
    "spills are removed while they are leased": {"core": RemovesLeasedSpills, **BESIDE},
    "what a dead lane left of a spill is published": {"core": PublishesLeavings, **BESIDE},
    "tensors on their way outlive the call that was cancelled": {"core": KeepsTensorsOfTheCancelled, **BESIDE},
    "another item's tensors are fetched": {"core": MixesTensorsUp, **BESIDE},
    "a frontend does not say that it has fetched tensors": {
        "spoil_frontend": with_offers(NeverSaysThatItFetched),
        **BESIDE,
    },
    "a job that is done is delivered again": {"core": DeliversTheDoneAgain, **JOBS},
    "a late word about a job is taken": {"core": TakesLateWords, **JOBS},
    "a job that is given back is lost": {"core": LosesWhatIsGivenBack, **JOBS},
    "a frontend does not tell the next writer of its jobs": {"spoil_frontend": posts_once, "kinds": RESTARTS, **JOBS},
    "a job that is posted anew ends pins of before": {
        "spoil_frontend": posts_end_pins_of_another_connection,
        "kinds": SILENCE,
        **JOBS,
    },
    "a backend lets go of what it reads": {
        "spoil_pulling": drops_what_is_read,
        "kinds": SILENCE,
        **BUSY,
        "jobs": 90,
        "requests": 40,
        "queue_seconds": 1.0,
    },
    "a backend says nothing of a job that has waited in it for too long": {
        "spoil_pulling": silent_over_lapsed_jobs,
        **JOBS,
    },
}
