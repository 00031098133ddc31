"""Makes a job of a rendered chat and posts it to the queue that the request names."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from mmprep.digest import Hasher
from mmprep.errors import Busy
from mmprep.job_content import JobContent
from mmprep.result import HeadItem, Place, ids_to_bytes
from mmprep.wire import messages
from mmprep_frontend.model import ServedModel
from mmprep_frontend.posts import ItemsMovedError
from mmprep_frontend.render.answer import generate_request, new_request_id
from mmprep_frontend.rendered import RenderedChat, RenderedItem
from mmprep_frontend.service import Service, now

_HASHER = Hasher("blake3")
_NO_ROOM = (
    "no shared memory is free for the request's tensors, and a queue takes only what lies there; post again later"
)


async def once(
    service: Service, sender: str, key: str | None, body: Sequence[bytes | memoryview]
) -> messages.Once | None:
    """Return what makes a request the same one when it is sent again; ``None`` without a key.

    Parameters
    ----------
    sender:
        Whose key it is.
    key:
        As the sender wrote it.
    body:
        All bytes of the request.
    """
    if key is None:
        return None
    scoped = _HASHER.content_digest(msgspec.msgpack.encode((sender, key)))
    digests = [await service.on_thread(_HASHER.content_digest, part) for part in body]
    return messages.Once(scoped, _HASHER.content_digest(b"".join(digests)))


async def post(
    service: Service, chat: RenderedChat, *, prefix: str, sender: str, same: messages.Once | None, expiry: float
) -> bytes:
    """Post a rendered chat, whose pins are let go in any case; return the answer's JSON.

    Parameters
    ----------
    prefix:
        Of the job's id.
    sender:
        Whose turn the job takes.
    same:
        From :func:`once`.
    expiry:
        Seconds in which it must be taken, where the request names no deadline.

    Raises
    ------
    MmprepError
        It was not accepted.
    """
    queue = chat.request.queue
    assert queue is not None, "the request names no queue"
    deadline_ms = chat.request.deadline_ms
    expires = now() + expiry if deadline_ms is None else chat.arrived + deadline_ms / 1000
    job = messages.Post(0, new_request_id(prefix), queue, sender, chat.request.priority or 0, 0, 0, (), same)
    try:
        job_id = await _post(service, chat, job, expires)
    except ItemsMovedError:
        assert chat.unasked is not None, "a job was looked at that brought no items"
        job_id = await _post(service, await chat.unasked.ask(), job, expires)
    return msgspec.json.encode({"request_id": job_id, "queue": queue})


async def _post(service: Service, chat: RenderedChat, job: messages.Post, expires: float) -> str:
    """Post a chat as ``job``, which lacks what depends on its items; return the job's id."""
    try:
        items = [_item(item, *placed) for item, placed in zip(chat.in_order(), _ranges(chat), strict=True)]
        content = _content(chat, service.served(), job.job, items)
        asked = msgspec.structs.replace(
            job,
            cost=len(chat.expanded.token_ids),
            places=tuple((item.place.slot, item.place.generation) for item in items if item.place is not None),
            items=() if chat.unasked is None else tuple(chat.unasked.items),
        )
        started = time.monotonic()
        job_id = await service.writer.jobs.post(
            asked, content.pieces(), offered=chat.offered, expires=expires, deadline=chat.deadline
        )
        if chat.unasked is not None:
            service.found(chat, started)
        return job_id
    finally:
        chat.release()


def _ranges(chat: RenderedChat) -> list[tuple[int, int]]:
    return [(placed.offset, placed.length) for placed in chat.expanded.ranges]


def _item(item: RenderedItem, offset: int, length: int) -> HeadItem:
    answer, place = item.answer, None
    if answer.inline:
        raise Busy(_NO_ROOM, retry_after=1.0)
    if answer.length:
        place = Place(answer.slot, answer.offset, answer.length, answer.generation, None, "view", answer.spill)
    return HeadItem(item.part.modality, item.key, offset, length, answer.outcome == "hit", answer.meta, place)


def request_of(chat: RenderedChat, model: ServedModel, request_id: str) -> bytes:
    """Return JSON of a chat's GenerateRequest, without its token ids and media."""
    rest = generate_request(
        chat.request,
        request_id=request_id,
        model=model.name,
        token_ids=chat.expanded.token_ids,
        max_model_len=model.max_model_len,
        defaults=model.sampling,
        prompt_text=chat.prompt.text,
        token_offsets=chat.offsets,
    )
    del rest["token_ids"], rest["features"]
    return msgspec.json.encode(rest)


def _content(chat: RenderedChat, model: ServedModel, job_id: str, items: Sequence[HeadItem]) -> JobContent:
    mapping = chat.ring
    return JobContent(
        request_of(chat, model, job_id),
        ids_to_bytes(chat.expanded.token_ids),
        tuple(items),
        mapping.name if mapping is not None else "",
        bytes.fromhex(mapping.epoch) if mapping is not None else bytes(16),
    )
