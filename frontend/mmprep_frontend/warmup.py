"""What a frontend does once before it takes requests, so that the first one is not slower than the next.

Chats are rendered as requests would be: with text alone, with tools, and with a medium of each modality that requests may
have, from JSON to the encoded answer with tensors and without. What the lanes compute is made up here: nothing is sent, and
neither the writer, the counters nor any cache sees anything of it.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import msgspec

from mmprep.card import ModelCard
from mmprep.digest import Hasher
from mmprep.errors import InvalidRequest
from mmprep.items import ItemMeta, Plan, Run, lay_out, region_size
from mmprep.wire.messages import ItemAnswer
from mmprep_frontend.http.chat_answer import encode_chat_answer
from mmprep_frontend.media.intake import Intake, Medium
from mmprep_frontend.media.keys import scope
from mmprep_frontend.model import ServedModel
from mmprep_frontend.offered import OfferItem
from mmprep_frontend.render.conversation import MediaPart
from mmprep_frontend.render.encodings import JSON, MSGPACK
from mmprep_frontend.render.expansion import expand
from mmprep_frontend.render.requests import ChatRequest, parse
from mmprep_frontend.rendered import RenderedChat, RenderedItem
from mmprep_frontend.wanted import wanted

_WORDS = "Hello"
_PAYLOADS = ("tensors", "none")
_TOKENS = 4
#: Bytes of a made-up item's tensors, as many as a picture of 640x480 has in uint8.
_BYTES = 1 << 21
#: The smallest GIF: one pixel. What is behind it belongs to nothing; of other modalities nothing here looks into the bytes.
_GIF = bytes.fromhex("47494638396101000100800000ffffff0000002c00000000010001000002024401003b")
#: Bytes of a made-up medium at most, as many as a JPEG of 640x480 has: the memory that these take is then there.
_ENCODED = 1 << 17
_TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}


def warm_up(
    model: ServedModel, intake: Intake, hasher: Hasher, limits: Mapping[str, int], threads: Sequence[Executor]
) -> None:
    """Render what requests can ask for; on the render thread.

    A template may refuse a conversation that is tried here: that is its right, and no reason not to start.

    Parameters
    ----------
    threads:
        That encode answers, one for each that there is: each gets the memory that an answer takes.
    """
    allowed = {modality: limit for modality, limit in limits.items() if limit > 0}
    for body in _bodies(model.card, allowed, min(_ENCODED, intake.most_bytes)):
        with contextlib.suppress(InvalidRequest):
            chat = _render(model, intake, hasher, allowed, parse(body, "chat"))
            for encoding in (JSON, MSGPACK):
                encoded = [thread.submit(encode_chat_answer, chat, model, "warm-up", encoding) for thread in threads]
                for answer in encoded:
                    answer.result()
    model.tokenizer.decode(model.tokenizer.encode_text(_WORDS, add_special_tokens=True).token_ids)
    model.stages.clear()


def _bodies(card: ModelCard, limits: Mapping[str, int], nbytes: int) -> Iterator[bytes]:
    text = {"type": "text", "text": _WORDS}
    data = base64.b64encode(_GIF.ljust(nbytes, b"\0")).decode()
    yield _body(_WORDS)
    yield _body(_WORDS, tools=[_TOOL])
    for placeholder in card.placeholders:
        if placeholder.modality in limits:
            kind = f"{placeholder.modality}_url"
            part = {"type": kind, kind: {"url": f"data:image/gif;base64,{data}"}}
            for payload in _PAYLOADS:
                yield _body([part, text], mm_payload=payload)


def _body(content: Any, **fields: Any) -> bytes:
    return msgspec.json.encode({"messages": [{"role": "user", "content": content}], **fields})


def _render(
    model: ServedModel, intake: Intake, hasher: Hasher, limits: dict[str, int], request: ChatRequest
) -> RenderedChat:
    conversation = model.walk(request, limits)
    prompt = model.encode_chat(conversation, request)
    media = intake.read_now(intake.sources(conversation.media, ()))
    items = [
        _item(model.card, hasher, part, medium)
        for part, medium in zip(conversation.media, media, strict=True)
        if medium is not None
    ]
    plans: dict[str, list[Plan]] = {}
    for item in items:
        plans.setdefault(item.part.modality, []).append(item.meta.plan)
    return RenderedChat(request, prompt, expand(prompt.token_ids, prompt.placeholders, plans), items=items)


def _item(card: ModelCard, hasher: Hasher, part: MediaPart, medium: Medium) -> RenderedItem:
    """Return an item as it might have come from the writer."""
    asked = wanted(
        part, medium, card=card, scope=scope("warm-up", None), hash_name=hasher.name, dtype="auto", io={}, kwargs={}
    )
    placeholder = card.placeholder(part.modality)
    assert isinstance(asked, OfferItem)
    assert placeholder is not None
    fields = lay_out([("tensor", "uint8", (_BYTES,), "flat", False), ("size", "int64", (3,), "batched", True)])
    plan = Plan((Run(placeholder.token_id, _TOKENS),))
    meta = ItemMeta(part.modality, plan, fields, {"size": bytes(fields[1].nbytes)})
    answer = ItemAnswer("computed", meta=meta.pack())
    return RenderedItem(part, asked.key, answer, meta, memoryview(bytes(region_size(fields))))
