"""The life of an injection in a frontend: read, check, offer, and see whose content is there then.

An item's key is made of its name, so what is there under it may be another one, or be put there by somebody else at the
same time. Its metadata hold the digest of what was injected: who finds another one asks for his to be put in its place.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import msgspec

from mmprep.digest import Hasher
from mmprep.errors import Busy, NotFound, ProtocolError
from mmprep.items import unpack_meta
from mmprep_frontend.dispatch import WriterLink
from mmprep_frontend.injection.body import Injection, read_injection
from mmprep_frontend.injection.item import PackedItem, pack
from mmprep_frontend.media.keys import alias, injected_hash, injected_key, scope
from mmprep_frontend.model import ServedModel
from mmprep_frontend.offered import InjectedItem, copying_cost
from mmprep_frontend.room import Held
from mmprep_frontend.service import Body, Service, now

#: How often an item is offered, where others inject under its name at the same time.
_TRIES = 4


class Injecting:
    """What injects.

    Parameters
    ----------
    service:
        Has the model and the threads.
    writer, hasher:
        Its parts.
    enabled:
        Whether it does, ``--enable-injection``.
    max_bytes:
        Of one item's tensors.
    """

    def __init__(self, service: Service, writer: WriterLink, hasher: Hasher, *, enabled: bool, max_bytes: int) -> None:
        self._service = service
        self._writer = writer
        self._hasher = hasher
        self._enabled = enabled
        self._max_bytes = max_bytes

    async def inject(self, body: Body, *, principal: str, held: Held) -> bytes:
        """Put the item in ``body`` into the cache of ``principal``; JSON of its hash, its length, and whether it was there.

        Parameters
        ----------
        held:
            Counts the bytes of the item beside those of the body.

        Raises
        ------
        MmprepError
            NotFound where injection is off, InvalidRequest or TooLarge that names the place, Busy where there is no room.
        """
        if not self._enabled:
            raise NotFound("this service takes no injected items; start it with --enable-injection")
        model, arrived = self._service.served(), now()
        held.hold_body(len(body) + min(len(body), self._max_bytes))
        injection, packed, digest = await self._service.parse_body(body, partial(self._read, model, body))
        model.check_name(injection.model)
        deadline = self._service.deadline(arrived, injection.deadline_ms)
        of = scope(principal, injection.cache_salt)
        key = injected_key(scope=of, modality=packed.modality, fingerprint=model.card.fingerprint, name=injection.key)
        name = alias(scope=of, modality=packed.modality, uuid=injection.key)
        cost = copying_cost(len(packed.frame))
        item = InjectedItem(key, packed.modality, memoryview(packed.frame), digest, cost, name)
        cached = await self._keep(item, deadline, injection.priority)
        self._service.metrics.count("mmprep_injections_total", modality=packed.modality)
        return msgspec.json.encode(
            {"hash": injected_hash(key, digest).hex(), "length": packed.length, "cached": cached}
        )

    def _read(self, model: ServedModel, body: Body) -> tuple[Injection, PackedItem, bytes]:
        injection = read_injection(body, model.max_model_len)
        model.tokenizer.check_ids(injection.token_ids, "expansion.token_ids")
        packed = pack(injection, model.card, self._max_bytes)
        return injection, packed, self._hasher.content_digest(packed.frame)

    async def _keep(self, item: InjectedItem, deadline: float, priority: int) -> bool:
        """Offer the item until it is there; return whether it was there before."""
        for _ in range(_TRIES):
            with await self._writer.offer([item], need="tensors", deadline=deadline, priority=priority) as offered:
                answer = offered.items[0]
            if answer.fault is not None:
                error = answer.fault.error()
                if not isinstance(error, ProtocolError):  # of two at the same time the other one's bytes were asked for
                    raise error
            elif unpack_meta(answer.meta).injected == item.digest:
                return answer.outcome == "hit"
            item = replace(item, replace=True)
        raise Busy("others inject under the same key at the same time; try again", param="key", retry_after=1.0)
