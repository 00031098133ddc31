"""A rendered request in the client that asked for it: token ids, and media whose tensors came along or lie in shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec
import zmq
from numpy.typing import NDArray

from mmprep.address import Address
from mmprep.errors import ProtocolError
from mmprep.item import Inline, Item, Runner, Shared, Source, features_of
from mmprep.items import ItemMeta, unpack_meta
from mmprep.registration import Registration
from mmprep.result import Head, HeadItem, ids_from_bytes, leased_address, unpack_head


class Result:
    """A rendered request.

    Attributes
    ----------
    request_id: the service's name for it.
    items: by modality, in the order of the prompt.
    max_tokens: how many tokens may be generated.
    prompt_text: the rendered template, where ``return_prompt_text`` was asked for.
    """

    def __init__(self, head: Head, items: dict[str, list[Item]]) -> None:
        self.items = items
        try:
            self._rest: dict[str, Any] = msgspec.json.decode(head.request, type=dict[str, Any])
            self.request_id: str = self._rest["request_id"]
            self.max_tokens: int = self._rest["sampling_params"]["max_tokens"]
        except (msgspec.MsgspecError, KeyError, TypeError):
            raise ProtocolError("an answer whose request is none") from None
        self.prompt_text: str | None = self._rest.get("prompt_text")
        self._token_ids = ids_from_bytes(head.token_ids)
        self._unexpanded = ids_from_bytes(head.unexpanded_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """The prompt, placeholders expanded."""
        ids: list[int] = self._token_ids.tolist()
        return ids

    @property
    def unexpanded_token_ids(self) -> list[int]:
        """The prompt with one placeholder a medium."""
        ids: list[int] = self._unexpanded.tolist()
        return ids

    @property
    def token_array(self) -> NDArray[Any]:
        """The prompt as an array of uint32, shape ``(length,)``, without a copy."""
        return self._token_ids

    @property
    def request(self) -> dict[str, Any]:
        """The GenerateRequest, in the form of the HTTP interface; its tensors are in :attr:`items`."""
        return {**self._rest, "token_ids": self.token_ids, "features": features_of(self.items)}

    def release(self) -> None:
        """Give up the tensors of every item."""
        for items in self.items.values():
            for item in items:
                item.release()


async def read_result(
    frames: Sequence[zmq.Frame], registration: Registration | None, sent_at: float, run: Runner | None
) -> Result:
    """Return what the frames behind an answer's header say.

    Parameters
    ----------
    registration:
        Holds the leases; ``None`` where no addresses were asked for.
    sent_at:
        When the request was sent, on the monotonic clock: leases count from then.
    run:
        Runs what items have to await, for callers without a loop.

    Raises
    ------
    ProtocolError
        They are no result.
    StaleAddress
        An item is gone since it was leased.
    """
    if not frames:
        raise ProtocolError("an answer without its frames")
    head = unpack_head(frames[0].buffer)
    items: dict[str, list[Item]] = {}
    try:
        for item in head.items:
            meta = unpack_meta(item.meta)
            source, address = await _source(item, meta, head, frames, registration, sent_at=sent_at)
            made = Item(
                meta,
                source,
                hash=item.hash.hex(),
                offset=item.offset,
                length=item.length,
                cached=item.cached,
                address=address,
                run=run,
            )
            items.setdefault(item.modality, []).append(made)
    except BaseException:
        for held in chain.from_iterable(items.values()):
            held.release()
        raise
    return Result(head, items)


async def _source(
    item: HeadItem,
    meta: ItemMeta,
    head: Head,
    frames: Sequence[zmq.Frame],
    registration: Registration | None,
    *,
    sent_at: float,
) -> tuple[Source | None, Address | None]:
    """Return where an item's tensors come from, if from anywhere, and the address that they have."""
    if item.frame >= 0:
        if item.frame >= len(frames):
            raise ProtocolError("an answer names a frame that it does not have")
        return Inline(frames[item.frame].buffer), None
    place = item.place
    if place is None or place.lease is None or registration is None:
        return None, None
    address = leased_address(
        item,
        meta,
        segment=head.segment,
        epoch=head.epoch,
        lease=place.lease,
        lease_kind=place.lease_kind,
        lease_seconds=head.lease_ms // 1000,
    )
    mapping, lease = registration.hold_now(address, sent_at) or await registration.hold(address, sent_at)
    address = msgspec.structs.replace(address, lease=lease.id.hex())
    return Shared(registration, mapping, address, lease), address
