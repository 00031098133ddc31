"""What waits for its turn, before the lanes and in the queues of jobs: bounded, urgent first, and fair between clients.

Among entries of the same priority, clients share the lanes by start-time fair queuing. A client's *tag* is the cost
that it has been served since the priority was last idle; the client with the lowest tag is next, its entries in the
order in which they came. A client that had nothing queued starts at the virtual time, which is the highest tag served so
far: idling gains nothing, and what was served before is not forgotten as long as others wait. A client is charged when
an entry is taken, so one that is removed costs nothing.

Heavy entries (video, huge pictures) are only given to lanes that take them. They do not stand before light ones: a
client's light entries pass its heavy ones on the way to a lane that takes light work only.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import NamedTuple

import msgspec

from mmprep import errors

#: Seconds after which a push that was refused may be tried again. Admission refuses earlier, and estimates.
RETRY_AFTER = 1.0
#: Outdated heap elements that are tolerated beyond as many as there are valid ones.
_SLACK = 256


class Entry(msgspec.Struct, frozen=True):
    """An uploaded medium that waits for a lane, or a job that waits for a backend.

    Attributes
    ----------
    flight_id: the flight's number, or the job's.
    client: who shares with whom; the flight's opener or the job's producer pays.
    cost: estimated pixels, or tokens; below 1 counts as 1.
    priority: lower is more urgent.
    nbytes: of the medium, or of the job.
    heavy: only for lanes that take heavy work.
    """

    flight_id: int
    client: str
    cost: int
    priority: int
    nbytes: int
    heavy: bool


class _Level:
    """One priority's virtual time and clients; it exists while it has entries."""

    __slots__ = ("clients", "priority", "virtual_time")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.virtual_time = 0
        self.clients: dict[str, _Flow] = {}


class _Flow:
    """One client's entries of one priority, by arrival; it exists while it has entries."""

    __slots__ = ("client", "heavy", "level", "light", "tag")

    def __init__(self, level: _Level, client: str, tag: int) -> None:
        self.level = level
        self.client = client
        self.tag = tag
        #: ``{flight_id: (arrival, entry)}``
        self.light: OrderedDict[int, tuple[int, Entry]] = OrderedDict()
        self.heavy: OrderedDict[int, tuple[int, Entry]] = OrderedDict()


class _Turn(NamedTuple):
    """A place in a heap; outdated when the flow's tag has moved on, or has nothing left that the heap is for."""

    priority: int
    tag: int
    arrival: int
    flow: _Flow


class FairQueue:
    """Entries for lanes. Every operation takes logarithmic time, amortised.

    Parameters
    ----------
    max_items, max_bytes:
        Bounds of the entries and of their media; none below admission's, so that what was admitted always fits.
    """

    def __init__(self, *, max_items: int, max_bytes: int) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._bytes = 0
        self._arrivals = 0
        self._flows: dict[int, _Flow] = {}
        self._levels: dict[int, _Level] = {}
        #: Tags above the virtual time of clients that have nothing queued: ``{(priority, client): (level, tag)}``.
        #: The oldest are forgotten first.
        self._debts: OrderedDict[tuple[int, str], tuple[_Level, int]] = OrderedDict()
        self._any: list[_Turn] = []
        self._light: list[_Turn] = []

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, flight_id: int) -> bool:
        return flight_id in self._flows

    @property
    def bytes(self) -> int:
        """Bytes of all queued media."""
        return self._bytes

    def push(self, entry: Entry, *, first: bool = False) -> None:
        """Add an entry; its flight must not be queued.

        Parameters
        ----------
        first:
            It goes before its client's others of that priority: its turn had come already.

        Raises
        ------
        mmprep.errors.Busy
            The queue is full; nothing has changed.
        """
        if len(self._flows) >= self._max_items or self._bytes + entry.nbytes > self._max_bytes:
            raise errors.Busy("The queue of media is full; send the request again later.", retry_after=RETRY_AFTER)
        assert entry.flight_id not in self._flows, f"flight {entry.flight_id} is queued already"
        self._add(entry, first=first)

    def pop(self, *, heavy_allowed: bool) -> Entry | None:
        """Take the next entry; ``None`` where there is none that this lane may take."""
        heap = self._any if heavy_allowed else self._light
        while heap:
            priority, tag, _, flow = heap[0]
            if flow.tag != tag or not (flow.light or (heavy_allowed and flow.heavy)):
                heapq.heappop(heap)
                continue
            entries = flow.light
            if heavy_allowed and flow.heavy:
                first_heavy = next(iter(flow.heavy.values()))[0]
                if not entries or first_heavy < next(iter(entries.values()))[0]:
                    entries = flow.heavy
            entry = next(iter(entries.values()))[1]
            level = self._levels[priority]
            level.virtual_time = max(level.virtual_time, tag)
            flow.tag = tag + max(entry.cost, 1)
            self._take(entry, flow)
            if flow.light or flow.heavy:
                self._line_up(flow)
            return entry
        return None

    def remove(self, flight_id: int) -> Entry | None:
        """Take out an entry that is not wanted any more; ``None`` where it is not queued."""
        flow = self._flows.get(flight_id)
        if flow is None:
            return None
        _, entry = flow.light.get(flight_id) or flow.heavy[flight_id]
        self._take(entry, flow)
        return entry

    def reprioritise(self, flight_id: int, priority: int) -> None:
        """Move an entry behind its client's others of that priority; nothing where it is not queued."""
        flow = self._flows.get(flight_id)
        if flow is None or flow.level.priority == priority:
            return
        entry = self.remove(flight_id)
        assert entry is not None, f"flight {flight_id} is queued nowhere"
        self._add(Entry(flight_id, entry.client, entry.cost, priority, entry.nbytes, entry.heavy))

    def _add(self, entry: Entry, *, first: bool = False) -> None:
        level = self._levels.get(entry.priority)
        if level is None:
            level = self._levels[entry.priority] = _Level(entry.priority)
        flow = level.clients.get(entry.client)
        if flow is None:
            debtor, tag = self._debts.pop((entry.priority, entry.client), (level, 0))
            tag = max(tag, level.virtual_time) if debtor is level else level.virtual_time
            flow = level.clients[entry.client] = _Flow(level, entry.client, tag)
        entries = flow.heavy if entry.heavy else flow.light
        self._arrivals += 1
        arrival = self._arrivals
        if first:
            arrival = (
                min([arrival, *(next(iter(those.values()))[0] for those in (flow.light, flow.heavy) if those)]) - 1
            )
        entries[entry.flight_id] = (arrival, entry)
        if first:
            entries.move_to_end(entry.flight_id, last=False)
        self._flows[entry.flight_id] = flow
        self._bytes += entry.nbytes
        if len(entries) == 1:
            self._line_up(flow)

    def _take(self, entry: Entry, flow: _Flow) -> None:
        """Take the entry out; the client's flow and the level go with their last one."""
        del (flow.heavy if entry.heavy else flow.light)[entry.flight_id]
        del self._flows[entry.flight_id]
        self._bytes -= entry.nbytes
        if flow.light or flow.heavy:
            return
        level = flow.level
        del level.clients[flow.client]
        if not level.clients:
            del self._levels[level.priority]
        elif flow.tag > level.virtual_time:
            self._debts[level.priority, flow.client] = (level, flow.tag)
            if len(self._debts) > self._max_items:
                self._debts.popitem(last=False)

    def _line_up(self, flow: _Flow) -> None:
        """Give the flow its turns at its present tag."""
        self._arrivals += 1
        turn = _Turn(flow.level.priority, flow.tag, self._arrivals, flow)
        heapq.heappush(self._any, turn)
        if len(self._any) > 2 * len(self._flows) + _SLACK:
            self._any = _valid(self._any, heavy=True)
        if flow.light:
            heapq.heappush(self._light, turn)
            if len(self._light) > 2 * len(self._flows) + _SLACK:
                self._light = _valid(self._light, heavy=False)

    def validate(self) -> None:
        """Check every invariant.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        flows = [flow for level in self._levels.values() for flow in level.clients.values()]
        found: dict[int, _Flow] = {}
        nbytes = 0
        for flow in flows:
            assert flow.light or flow.heavy, "a client without entries stayed"
            assert self._levels[flow.level.priority].clients[flow.client] is flow, "a client is in a wrong place"
            turns = [turn for turn in self._any if turn.flow is flow and turn.tag == flow.tag]
            assert turns, "a client with entries has no turn"
            assert not flow.light or any(turn.flow is flow and turn.tag == flow.tag for turn in self._light), (
                "a client with light entries has no turn among them"
            )
            for heavy, entries in ((False, flow.light), (True, flow.heavy)):
                arrivals = [arrival for arrival, _ in entries.values()]
                assert arrivals == sorted(arrivals), "a client's entries are not in the order of arrival"
                for flight_id, (_, entry) in entries.items():
                    place = (flight_id, flow.client, flow.level.priority, heavy)
                    assert place == (entry.flight_id, entry.client, entry.priority, entry.heavy), (
                        f"flight {flight_id} is in a wrong place"
                    )
                    found[flight_id] = flow
                    nbytes += entry.nbytes
        assert found == self._flows, "the index by flight and the entries differ"
        assert nbytes == self._bytes <= self._max_bytes, "the bytes do not add up, or are above their bound"
        assert len(found) <= self._max_items, "more entries than allowed"
        assert len(self._debts) <= self._max_items, "the tags of absent clients pile up"
        assert all(level.clients for level in self._levels.values()), "a priority without entries stayed"


def _valid(turns: list[_Turn], *, heavy: bool) -> list[_Turn]:
    valid = [t for t in turns if t.flow.tag == t.tag and (t.flow.light or (heavy and t.flow.heavy))]
    heapq.heapify(valid)
    return valid
