"""Bridge to Dynamo 1.6: its frontend prepares chats through mmprep, and its workers read the tensors where they lie.

- :func:`chat_engine_factory` makes the chat engine of a Dynamo frontend.
- :func:`open_items` gives a worker the tensors of a request, without a copy.
- :func:`to_extra_args` and :func:`routing_token_ids` are for those who write a chat engine, or a router, of their own.

Only the factory imports Dynamo, and only when it is asked for an engine.
"""

from mmprep.bridges.dynamo.factory import chat_engine_factory
from mmprep.bridges.dynamo.requests import routing_token_ids, to_extra_args
from mmprep.bridges.dynamo.worker import open_items

__all__ = ["chat_engine_factory", "open_items", "routing_token_ids", "to_extra_args"]
