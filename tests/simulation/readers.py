"""Simulated frontends, backends and clients, around the real :class:`WriterLink`, :class:`LocalReader`, :class:`Pulling` and
:class:`Shared`.

Frontends serve chats for tensors, for plans, and for addresses leased to a backend; what travels inline goes with the answer.
Backends ask for themselves, or are handed what a client asked for in their name; they copy slowly, hold views and look again
and again, let go, and look once more. A client hands an address over again and again, to whatever process has its backend's
id then, and gives leases up that it has handed over. It posts jobs, too, which backends pull: see
:mod:`tests.simulation.jobs`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from itertools import count
from typing import NamedTuple

import msgspec
from tests.simulation.jobs import QUEUES, Order, Work
from tests.simulation.memory import offered as offered_as
from tests.simulation.seams import Context, Runtime
from tests.simulation.world import Loop, Process, Violation

from mmprep.address import Address
from mmprep.errors import Busy, DeadlineExceeded, LeaseLost, MmprepError, ServiceUnavailable, StaleAddress
from mmprep.item import Shared
from mmprep.items import align
from mmprep.job_content import JobContent
from mmprep.lease_id import lease_incarnation
from mmprep.pulling import Pulling
from mmprep.reading import LocalReader
from mmprep.result import HeadItem, Place
from mmprep.segment import sibling_name
from mmprep.wire import messages
from mmprep_frontend.dispatch import WriterLink
from mmprep_frontend.known import KnownItems
from mmprep_frontend.offered import OfferItem
from mmprep_frontend.posts import ItemsMovedError

#: As in :mod:`mmprep.client`.
MOST_RESENDS = 8
MOST_RETRIES = 3
CHUNKS = 3


class Asked(NamedTuple):
    """What a call asks for; ``lease``: of which kind to which backend; ``order``: the job that it is to become."""

    number: int
    media: tuple
    need: str
    priority: int
    lease: messages.LeaseTo | None
    order: Order | None = None


class Answered(NamedTuple):
    """What a frontend answers, for each medium; ``None`` where the answer has no tensors, or no address."""

    metas: list
    tensors: list
    addresses: list

    @property
    def leases(self):
        """Return the ids of all leases."""
        return tuple(bytes.fromhex(address.lease) for address in self.addresses if address is not None)


class Accepted(NamedTuple):
    """What a frontend answers where a call has become a job."""

    job: str


class Ticket:
    """One try of one call at one frontend; it gets one outcome."""

    def __init__(self, caller, frontend, asked, seconds):
        self.caller, self.frontend, self.asked = caller, frontend, asked
        self.deadline = caller.world.now + seconds
        self.future = caller.loop.create_future()
        self.over = False
        self.unwanted = lambda _: None
        self._replies = 0
        self._lost = lambda: caller.after(caller.world.random.uniform(0.0, 0.1), self._fail)
        if frontend.alive:
            frontend.deaths.append(self._lost)
            frontend.after(caller.service.network.delay(), frontend.asked, self, kind="message")
        else:
            self._lost()

    def reply(self, outcome):
        """Send the answer; return whether the caller is still there."""
        self._replies += 1
        if self._replies > 1:
            raise Violation(f"{self.frontend} answers call {self.asked.number} twice")
        if not self.caller.alive:
            return False
        self.caller.after(self.caller.service.reply_delay(), self._resolve, outcome, kind="message")
        return True

    def _resolve(self, outcome):
        self._done()
        if self.over or self.future.done():
            self.unwanted(outcome)
        elif isinstance(outcome, MmprepError):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)

    def _fail(self):
        if not self.future.done():
            self.future.set_exception(FrontendLostError("the frontend went away"))

    def _done(self):
        with contextlib.suppress(ValueError):
            self.frontend.deaths.remove(self._lost)


class FrontendLostError(ServiceUnavailable):
    """As in :mod:`mmprep.client`."""


class Looping(Process):
    """A process with an event loop."""

    def __init__(self, service, role, ident):
        super().__init__(service.world, role, ident)
        self.service, self.settings, self.oracle = service, service.settings, service.oracle
        self.loop = Loop(self)
        self.tasks = set()

    def spawn(self, coroutine):
        task = self.loop.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task):
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self.world.failure is None:
            error = task.exception()
            failure = error if isinstance(error, Violation) else Violation(f"{self}: {error!r}")
            failure.__cause__ = error
            self.world.failure = failure

    def nap(self, longest):
        return asyncio.sleep(self.world.random.uniform(0.0, longest))


class Frontend(Looping):
    """One frontend process."""

    def __init__(self, service, number):
        super().__init__(service, "frontend", str(number))
        self._serving = {}
        self._known = KnownItems(1 << 20)
        self.link = None
        self.after(0.0, self._start)

    def _start(self):
        self.link = WriterLink(
            Context(),
            Runtime(),
            int(self.id),
            hasher="sha256",
            inline_size=self.settings.inline,
            queue_size=1 << 20,
            on_card=lambda _: None,
        )
        self.settings.spoil_frontend(self.link)

    def validate(self):
        if self.link is not None:
            self.link._offers.validate()
            self.link.jobs._posts.validate()
            self._known.validate()

    def asked(self, ticket):
        if self.link is None:
            ticket.reply(ServiceUnavailable("starting"))
            return
        task = self._serving[ticket] = self.spawn(self._serve(ticket))
        task.add_done_callback(lambda _: self._serving.pop(ticket, None))

    def cancelled(self, ticket):
        task = self._serving.get(ticket)
        if task is not None:
            task.cancel()

    async def _serve(self, ticket):
        """As the native door: one answer; what could not be delivered is given back."""
        try:
            if ticket.asked.order is not None:
                ticket.reply(Accepted(await self._post(ticket)))
                return
            offered, answer = await self._chat(ticket)
        except MmprepError as error:
            ticket.reply(error)
            return
        try:
            delivered = ticket.reply(answer)
        except BaseException:
            offered.give_back()
            raise
        if delivered:
            offered.release()
        else:
            offered.give_back()

    def _deadline(self, ticket):
        return self.loop.time() + ticket.deadline - self.world.now

    async def _offer(self, ticket):
        asked = ticket.asked
        items = [OfferItem(m.key, "image", m.encoded, m.digest, b"", m.cost) for m in asked.media]
        offered = await self.link.offer(
            items, need=asked.need, deadline=self._deadline(ticket), priority=asked.priority, lease=asked.lease
        )
        fault = next((item.fault for item in offered.items if item.fault is not None), None)
        if fault is not None:
            offered.give_back()
            raise fault.error()
        return offered

    async def _post(self, ticket):
        """As :mod:`mmprep_frontend.posting`: of what is remembered, if all of it is, else of what was offered."""
        mapping = self.link.mapping
        if not ticket.asked.media:
            return await self._post_of(ticket, mapping, (), None)
        known = [mapping and self._known.get(m.key, "tensors", mapping.epoch) for m in ticket.asked.media]
        if all(known) and self.world.chance(0.7):
            with contextlib.suppress(ItemsMovedError):
                return await self._post_of(ticket, mapping, [item.answer for item in known], None)
        offered = await self._offer(ticket)
        try:
            if any(item.inline for item in offered.items):
                raise Busy("no shared memory is free", retry_after=1.0)
            for medium, item in zip(ticket.asked.media, offered.items, strict=True):
                self._known.note(medium.key, item, None, offered.mapping.epoch)
            return await self._post_of(ticket, offered.mapping, offered.items, offered)
        finally:
            offered.release()

    async def _post_of(self, ticket, mapping, answers, offered):
        asked, order, now = ticket.asked, ticket.asked.order, self.loop.time()
        places = [Place(a.slot, a.offset, a.length, a.generation, None, "view", a.spill) for a in answers]
        items = tuple(
            HeadItem("image", medium.key, 0, 0, False, answer.meta, place)
            for medium, answer, place in zip(asked.media, answers, places, strict=True)
        )
        ring = ("", bytes(16)) if mapping is None else (mapping.name, bytes.fromhex(mapping.epoch))
        content = JobContent(order.text, b"", items, *ring)
        post = messages.Post(
            0,
            self.service.ledger.made(order, asked.media, self, self.world.now + order.expires),
            order.queue,
            f"producer-{order.number % 2}",
            asked.priority,
            1,
            0,
            tuple((place.slot, place.generation) for place in places),
            order.once,
            items=() if offered is not None else offered_as(asked.media),
        )
        return await self.link.jobs.post(
            post, content.pieces(), offered=offered, expires=now + order.expires, deadline=self._deadline(ticket)
        )

    async def _chat(self, ticket):
        asked = ticket.asked
        offered = await self._offer(ticket)
        metas = [item.meta for item in offered.items]
        nothing = [None] * len(metas)
        if asked.need == "plan":
            return offered, Answered(metas, nothing, nothing)
        addresses = nothing if asked.lease is None else [self._address(offered, item, asked) for item in offered.items]
        travel = [item for item in offered.items if asked.lease is None or item.inline]
        try:
            tensors = await self._tensors(offered, travel)
        except BaseException:
            offered.give_back()
            raise
        return offered, Answered(metas, [tensors.get(id(item)) for item in offered.items], addresses)

    def _address(self, offered, item, asked):
        """As in :mod:`mmprep_frontend.http.chat_answer`."""
        mapping = offered.mapping
        if item.inline:
            return None
        return Address(
            segment=mapping.name if item.spill is None else sibling_name(mapping.name, item.spill),
            epoch=mapping.epoch if item.spill is None else item.spill.hex(),
            slot=item.slot,
            offset=item.offset,
            length=item.length,
            generation=item.generation,
            metadata_length=len(item.meta),
            fields=(),
            lease=item.lease.hex(),
            lease_kind=asked.lease.kind,
            lease_seconds=offered.lease_ms // 1000,
        )

    async def _tensors(self, offered, items):
        """Copy tensors, piece by piece, and check afterwards what is pinned; returns them by ``id(item)``."""
        connection = self.link._link.connection
        ring = offered.mapping.name
        uses = [
            self.oracle.use(
                ring if item.spill is None else sibling_name(ring, item.spill),
                item.offset,
                item.length,
                f"{self} reads what is pinned for it",
                valid=lambda: self.alive and connection is not None and connection.up and not self.service.harsh,
            )
            for item in items
            if not item.inline
        ]
        try:
            tensors = {}
            for item in items:
                region = offered.region(item)
                copied = bytearray()
                for chunk in range(CHUNKS):
                    start, end = (len(region) * at // CHUNKS for at in (chunk, chunk + 1))
                    copied += region[start:end]
                    await self.nap(0.05)
                tensors[id(item)] = bytes(copied)
            if uses:
                offered.check()
        finally:
            for use in uses:
                self.oracle.end(use)
        return tensors


class Caller(Looping):
    """A process that asks frontends."""

    def __init__(self, service, role, ident):
        super().__init__(service, role, ident)
        self._numbers = count(1)

    async def ask(self, media, need, priority, lease, seconds, *, order=None):
        """Make one call, again where a frontend is lost; raises MmprepError."""
        asked = Asked(next(self._numbers), media, need, priority, lease, order)
        end = self.loop.time() + seconds
        try:
            async with asyncio.timeout(seconds):
                for resends_left in reversed(range(MOST_RESENDS + 1)):
                    try:
                        return await self._once(asked, max(0.001, end - self.loop.time()))
                    except FrontendLostError:
                        if not resends_left:
                            raise
        except TimeoutError:
            raise DeadlineExceeded("no answer in time") from None

    async def _once(self, asked, seconds):
        living = [frontend for frontend in self.service.frontends if frontend.alive]
        while not living:
            await asyncio.sleep(0.05)
            living = [frontend for frontend in self.service.frontends if frontend.alive]
        frontend = self.world.random.choice(living)
        ticket = Ticket(self, frontend, asked, seconds)
        ticket.unwanted = lambda outcome: self.unwanted(asked, outcome)
        try:
            return await ticket.future
        except asyncio.CancelledError:
            ticket.over = True
            frontend.after(self.service.network.delay(), frontend.cancelled, ticket, kind="message")
            raise

    def unwanted(self, asked, outcome):
        """An answer came too late."""

    async def call(self, media, need, priority, lease, seconds, *, order=None):
        """Make one call and account for its outcome; returns the answer or ``None``."""
        tally, started = self.service.tally, self.world.now
        number = tally.begin(self, seconds)
        try:
            answer = await self.ask(media, need, priority, lease, seconds, order=order)
        except MmprepError as error:
            tally.end(number, type(error).__name__)
            self.world.say(f"{self} is told after {self.world.now - started:.3f} s: {error!r}")
            self.service.judge(error, media)
            return None
        tally.end(number, "answered" if order is None else "posted")
        if order is not None:
            return answer
        for medium, meta in zip(media, answer.metas, strict=True):
            self.oracle.read(f"{self} (metadata)", medium, meta, medium.meta)
        for medium, tensors in zip(media, answer.tensors, strict=True):
            if tensors is not None:
                self.oracle.read(f"{self} (inline)", medium, tensors, medium.tensors)
        return answer


class Client(Caller):
    """Asks over HTTP, in the name of backends too; it never dies."""

    def __init__(self, service):
        super().__init__(service, "client", "0")
        #: What was handed over before: backends' ids, media and addresses.
        self._handed = deque(maxlen=12)

    def unwanted(self, asked, outcome):
        if isinstance(outcome, Answered) and outcome.leases:
            self.spawn(self.give_up(asked.lease.backend, outcome.leases))

    async def give_up(self, backend, leases):
        """Release leases that nobody will use, through any frontend."""
        living = [one for one in self.service.frontends if one.alive and one.link is not None]
        if not living:
            return
        frontend = self.world.random.choice(living)
        frontend.after(self.service.network.delay(), lambda: frontend.spawn(self._release(frontend, backend, leases)))

    async def _release(self, frontend, backend, leases):
        with contextlib.suppress(MmprepError):
            await frontend.link.release(backend, leases)

    async def request(self, media, need, priority, lease, seconds):
        answer = await self.call(media, need, priority, lease, seconds)
        if answer is None or not answer.leases:
            return
        self._handed.append((lease.backend, media, answer.addresses))
        self._hand_over(*self._handed[-1])
        while self.world.chance(0.5):
            await self.nap(1.0)
            self._hand_over(*self.world.random.choice(self._handed))
        if self.world.chance(0.15):  # the answer came all the same
            await self.give_up(lease.backend, answer.leases)

    async def post(self, media, priority, seconds, order):
        """Post a job."""
        answer = await self.call(media, "tensors", priority, None, seconds, order=order)
        if answer is not None:
            self.service.ledger.accepted(answer.job, order)

    def _hand_over(self, ident, media, addresses):
        backend = self.service.backends.get(ident)
        if backend is not None and backend.alive:
            backend.after(self.service.network.delay(), backend.given, media, addresses, kind="message")


class Backend(Caller):
    """A process that stands for an engine."""

    def __init__(self, service, ident):
        super().__init__(service, "backend", ident)
        self.registration = None
        self.jobs = None
        self.leaving = False
        self._early = []
        self.after(0.0, self._start)

    def _start(self):
        pulling = None
        if self.settings.jobs:
            queues = QUEUES if self.id == "engine-0" else self.world.random.choice([QUEUES, QUEUES[1:]])
            pulling = Pulling(queues, self.world.random.choice([1, 1, 3]), None, self._delivered)
            self.jobs = Work(self, pulling)
        reader = LocalReader(Context(), Runtime(), self.id, pulling, None)
        self.registration = reader.registration
        if pulling is not None:
            pulling.use(reader)
            self.settings.spoil_pulling(pulling)
        self.settings.spoil_backend(self.registration)
        for given in self._early:
            self.given(*given)

    def validate(self):
        if self.registration is not None:
            self.registration._holdings.validate()

    def _delivered(self, _, held, content):
        """A job has come; returns it as :class:`Work` takes it."""
        self.spawn(self.jobs.one())
        return held, content

    def unwanted(self, _, outcome):
        if isinstance(outcome, Answered):
            for lease in outcome.leases:
                self.registration.give_up(lease)

    def given(self, media, addresses):
        if self.registration is None:
            self._early.append((media, addresses))
        else:
            self.spawn(self._use_all(media, addresses, None))

    def begin(self, *request):
        self.spawn(self.request(*request))

    async def request(self, media, priority, kind, seconds):
        """As the native client's chat with ``payload="shm"``."""
        if self.registration is None:
            return
        with contextlib.suppress(MmprepError):
            await self.registration.ready(10.0)
            for _ in range(MOST_RETRIES + 1):
                sent_at = self.loop.time()
                answer = await self.call(media, "tensors", priority, messages.LeaseTo(self.id, kind), seconds)
                if answer is None:
                    return
                try:
                    await self._use_all(media, answer.addresses, sent_at)
                except StaleAddress:
                    continue
                return

    async def _use_all(self, media, addresses, sent_at):
        """Open all, then use them side by side; those who can't be opened are stale."""
        pairs = [(medium, at) for medium, at in zip(media, addresses, strict=True) if at is not None]
        items = []
        try:
            for medium, address in pairs:
                held = self.registration.hold_now(address, sent_at) or await self.registration.hold(address, sent_at)
                items.append((medium, address, *held))
        except MmprepError as error:
            if isinstance(error, StaleAddress) and self._must_be_there(pairs[len(items)][1], sent_at):
                raise Violation(f"{self} was leased {pairs[len(items)][1]}, and finds nothing there") from None
            for *_, lease in items:
                lease.release()
            for _, address in pairs[len(items) :]:  # Backend.open's callers have the addresses, and let go of them
                self.registration.give_up(bytes.fromhex(address.lease))
            if sent_at is not None and isinstance(error, StaleAddress):
                raise
            return
        for medium, address, mapping, lease in items:
            self.spawn(self._use(medium, address, mapping, lease))

    def _must_be_there(self, address, sent_at):
        """Whether the lease of an address that was asked for at ``sent_at`` surely holds, by this process's clock."""
        writer = self.service.writer
        if self.service.harsh or not self.clock_is_right or sent_at is None or not writer.alive or writer.core is None:
            return False
        granted_by_it = lease_incarnation(bytes.fromhex(address.lease)) == writer.core.ring.incarnation
        return granted_by_it and self.loop.time() < sent_at + self.settings.lease_seconds

    async def _use(self, medium, address, mapping, lease):
        world, random = self.world, self.world.random
        source = Shared(self.registration, mapping, address, lease)
        try:
            for _ in range(random.randint(1, 3)):
                if random.random() < 0.5:
                    await self._copy(source, medium, address, mapping, lease)
                else:
                    await self._view(source, medium, address, mapping)
                if not self.leaving:
                    await self.nap(random.choice([0.1, 0.5, self.settings.lease_seconds * 1.5]))
            if world.chance(0.2):
                await self._another(medium, address)
        except (StaleAddress, LeaseLost) as error:
            self.oracle.stale += 1
            world.say(f"{self} is told of medium {medium.number}: {error!r}")
        except MmprepError as error:
            world.say(f"{self} cannot use medium {medium.number}: {error!r}")
        finally:
            source.release()
        if world.chance(0.3):  # without a lease: the right bytes, or an error
            with contextlib.suppress(StaleAddress):
                self.oracle.read(self, medium, await self._slow_copy(address, mapping), medium.extent)

    async def use_once(self, source, medium, address):
        """Look at the tensors of a job's item, as long as they are there."""
        try:
            if self.world.chance(0.3):
                found = source.copy()
                self.oracle.read(self, medium, bytes(found), medium.tensors)
            await self._view(source, medium, address, source._checked())
        except (StaleAddress, LeaseLost) as error:
            self.oracle.stale += 1
            self.world.say(f"{self} is told of a job's medium {medium.number}: {error!r}")

    async def _another(self, medium, address):
        """Take a second lease on the same content, and let it go."""
        kind = self.world.random.choice(["copy", "view"])
        mapping, lease = await self.registration.acquire(address, kind)
        source = Shared(self.registration, mapping, msgspec.structs.replace(address, lease_kind=kind), lease)
        try:
            await self._view(source, medium, address, mapping)
        finally:
            source.release()

    async def _copy(self, source, medium, address, mapping, lease):
        """As :meth:`Shared.copy`, in several steps of time."""
        source._checked()
        try:
            found = await self._slow_copy(address, mapping)
        except StaleAddress:
            if self._promised(lease, mapping):
                raise Violation(f"{self} holds a lease of medium {medium.number}, and its content is gone") from None
            raise
        self.oracle.read(self, medium, found, medium.extent)

    def _promised(self, lease, mapping):
        """Whether the content must be there, by what the backend was told and by its clock."""
        holdings = self.registration._holdings
        holding = holdings._held.get(lease.id)
        if self.service.harsh or not self.clock_is_right or mapping is not self.registration.mapping or holding is None:
            return False
        return holding.sure and self.loop.time() < holding.deadline

    async def _slow_copy(self, address, mapping):
        mapping.check(address)
        copied = bytearray()
        extent = mapping.extent(address)
        for chunk in range(CHUNKS):
            start, end = (address.length * at // CHUNKS for at in (chunk, chunk + 1))
            copied += extent[start:end]
            await self.nap(0.05)
        if not hasattr(self.registration, "checks_nothing"):
            mapping.check(address)
        return bytes(copied)

    async def _view(self, source, medium, address, mapping):
        region = source.hold_now()
        held = region is None
        if held:
            region = await source.hold()
        use = self.oracle.use(
            mapping.name,
            address.offset,
            address.length,
            f"{self} views medium {medium.number}",
            valid=lambda: self.alive and not mapping.frozen,
        )
        try:
            for _ in range(self.world.random.randint(1, 5)):
                assert len(region) == address.length - align(address.metadata_length)
                self.oracle.read(self, medium, bytes(region), medium.tensors)
                if not self.leaving:
                    await self.nap(self.world.random.choice([0.05, 0.5, 2.0]))
        finally:
            self.oracle.end(use)
            if held:
                await source.let_go()
