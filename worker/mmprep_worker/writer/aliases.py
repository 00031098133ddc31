"""Which content an alias stands for: what a caller's ``uuid`` leads to. A part of the writer's state machine.

An alias is a digest of scope, modality and uuid, which a frontend makes; the writer never sees the uuid. Rules:

- It stands for the content that was last sent with it, from the moment when the writer hears of that content, whatever
  becomes of the request: there may be no room for it, or it may turn out to be no picture. If an alias waited for the
  outcome, who recalls it meanwhile, or after a failure, would get the content before: another picture, without a word.
  So he waits for the same computation, or is told that nobody has the content.
- Of requests that are under way at once, and of the items of one offer, the one that the writer hears of last counts.
  An offer's own aliases count after it was looked up what it recalls.
- It leads to a digest, and with the variant of who asks to a key, which holds his scope. So nobody reads another's content
  by an alias, whatever he calls it, and no alias is a key.
- A recalled item is found in the cache or computed by a flight that others have opened; it never opens one. Where there is
  neither, :func:`~mmprep_worker.scheduling.flight.nobody_has_it` tells to send the data.
- A job that its frontend has made of what it remembers is taken where each alias leads to the very key that it is remembered
  for: another frontend may have heard of other content since.
- What was injected is found under a key that is made of its name, without this table, so that the next writer finds it
  too. A name stands for one of the two: content that is sent with it takes the place of what was injected, whose entry goes,
  and when an item has been injected its alias is forgotten.
- The least recently used go first. All are forgotten when the cache is cleared, and by the next writer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from mmprep.keys import item_key
from mmprep.wire.messages import Item, Offered, Recalled, Remembered
from mmprep_worker.scheduling.flight import nobody_has_it
from mmprep_worker.writer.state import PendingCall, failed

#: 14 MB of memory.
MOST_ALIASES = 65_536


class Aliases:
    """The table.

    Parameters
    ----------
    max_entries:
        At least one.
    """

    def __init__(self, max_entries: int = MOST_ALIASES) -> None:
        self._max_entries = max_entries
        self._digests: OrderedDict[bytes, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._digests)

    def get(self, alias: bytes) -> bytes | None:
        """Return the digest of the content that ``alias`` stands for, and note its use; ``None`` for an unknown one."""
        digest = self._digests.get(alias)
        if digest is not None:
            self._digests.move_to_end(alias)
        return digest

    def point(self, alias: bytes, digest: bytes) -> None:
        """Let ``alias`` stand for the content with this digest."""
        self._digests[alias] = digest
        self._digests.move_to_end(alias)
        if len(self._digests) > self._max_entries:
            self._digests.popitem(last=False)

    def forget(self, alias: bytes) -> None:
        """Let ``alias`` stand for nothing."""
        self._digests.pop(alias, None)

    def clear(self) -> None:
        """Forget everything."""
        self._digests.clear()

    # --- offers ---------------------------------------------------------------------------------------------------

    def recall(self, pending: PendingCall) -> None:
        """Find the keys of what a call recalls; what nobody has sent is answered at once."""
        for position, item in enumerate(pending.offered):
            if isinstance(item, Recalled):
                digest = self.get(item.alias)
                if digest is not None:
                    pending.keys[position] = item_key(item.variant, digest)
                elif item.injected is not None:
                    pending.keys[position] = item.injected
                else:
                    pending.answers[position] = failed(nobody_has_it())

    def note(self, items: Iterable[Item | Remembered]) -> None:
        """Let the aliases in an offer, or of a job, stand for what they came with."""
        for item in items:
            if isinstance(item, Offered) and item.alias is not None:
                self.point(item.alias.id, item.alias.digest)

    def lead_to(self, items: Iterable[Offered | Remembered]) -> bool:
        """Whether the aliases that are remembered stand for what they are remembered for."""
        for item in items:
            if isinstance(item, Remembered):
                digest = self.get(item.alias)
                if digest is None or item_key(item.variant, digest) != item.key:
                    return False
        return True

    def validate(self) -> None:
        """Check the invariants; raises AssertionError."""
        assert len(self._digests) <= self._max_entries, "there are more aliases than the limit"
        assert all(len(part) == 32 for entry in self._digests.items() for part in entry), "an alias is no digest"
