"""Who a request is from, and what its answer is to be, as the door that it came through knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mmprep_frontend.render.encodings import JSON, Encoding
from mmprep_frontend.room import Held

#: The principal of those who show no key: everybody where there are no keys, and native clients, who are of the
#: service's own user.
ANONYMOUS: Final = "anonymous"


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of one request.

    Attributes
    ----------
    request_id: the sender's own, or a fresh one.
    principal: whose cache the request uses.
    held: what the request holds of the frontend's memory.
    encoding: of its answer.
    sender: who it is, whoever else uses the same cache.
    keys: what it has sent as ``Idempotency-Key``, under which it may send the request again; not checked.
    """

    request_id: str
    principal: str
    held: Held
    encoding: Encoding = JSON
    sender: str = ANONYMOUS
    keys: tuple[str, ...] = ()
