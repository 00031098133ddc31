"""The chat engines of a Dynamo frontend.

Dynamo asks for one whenever a model appears, with the card of the model and the engine behind its router. All of them share one
client of the service, which serves one model: a frontend has one service, and a service one model. It connects with the first
chat, so that neither has to be there before the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from mmprep.bridges.dynamo.chat import ChatEngine, Decode
from mmprep.client import AsyncClient
from mmprep.errors import MmprepError, StartupError

_EOS_FILES = ("generation_config.json", "config.json")


class ChatEngineFactory:
    """Makes chat engines; see :func:`chat_engine_factory`."""

    def __init__(self, endpoint: str | None, request_timeout: float) -> None:
        self._endpoint = endpoint
        self._timeout = request_timeout
        self._opening: asyncio.Task[AsyncClient] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __call__(self, _instance: Any, card: Any, routed: Any) -> Any:
        """Return the chat engine of one model; Dynamo calls this.

        Raises
        ------
        StartupError
            The model's directory has no ``tokenizer.json``.
        """
        from dynamo.llm import PythonAsyncEngine  # noqa: PLC0415 -- the engine's own

        directory = Path(card.local_dir())
        engine = ChatEngine(self._client, routed, read_decoder(directory), read_eos(directory))
        return PythonAsyncEngine(engine.generate, asyncio.get_running_loop())

    async def _client(self) -> AsyncClient:
        if self._opening is None or (self._opening.done() and self._opening.exception() is not None):
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> AsyncClient:
        client = AsyncClient(self._endpoint, request_timeout=self._timeout)
        await client.open()
        return client

    async def close(self) -> None:
        """Disconnect from the service: chats under way fail. Again is no error."""
        opening, self._opening = self._opening, None
        if opening is not None:
            with contextlib.suppress(MmprepError):  # it could not be opened
                await (await opening).close()


def chat_engine_factory(endpoint: str | None = None, *, request_timeout: float = 60.0) -> ChatEngineFactory:
    """Return what goes into Dynamo's ``EntrypointArgs(chat_engine_factory=…)``.

    Parameters
    ----------
    endpoint:
        ``ipc://`` and the service's runtime directory; by default the one that ``mmprep serve`` uses by default.
    request_timeout:
        Seconds for rendering one chat.

    Returns
    -------
    Also an asynchronous context manager, which disconnects at its end.
    """
    return ChatEngineFactory(endpoint, request_timeout)


def read_decoder(directory: Path) -> Callable[[bool], Decode]:
    """Return what makes, for one answer, a function from one more id to the text that it adds.

    Parameters
    ----------
    directory:
        Of the model, with its ``tokenizer.json``.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415 -- comes with the extra
    from tokenizers.decoders import DecodeStream  # noqa: PLC0415

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise StartupError("the model that the worker registers has no tokenizer.json; text is made of ids by it")
    tokenizer = Tokenizer.from_file(str(file))

    def decoder(skip_special_tokens: bool) -> Decode:
        stream = DecodeStream(skip_special_tokens=skip_special_tokens)

        def decode(token: int) -> str | None:
            text: str | None = stream.step(tokenizer, token)
            return text

        return decode

    return decoder


def read_eos(directory: Path) -> list[int]:
    """Return the ids that end an answer: of the first file that names any."""
    for name in _EOS_FILES:
        file = directory / name
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []
