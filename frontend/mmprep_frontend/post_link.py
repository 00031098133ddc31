"""Posts a frontend's jobs on its link to the writer: the futures and the timer around :mod:`mmprep_frontend.posts`."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import msgspec

from mmprep import failpoints
from mmprep.errors import Busy, DeadlineExceeded, MmprepError, ServiceUnavailable
from mmprep.wire import messages
from mmprep.wire.codec import pack
from mmprep.wire.frames import Frames
from mmprep_frontend.offered import Offered
from mmprep_frontend.offers import Offers
from mmprep_frontend.posts import Action, Posts, Say, Settle

#: Numbers of posts are above those of offers, which have the same connection.
_FIRST_POST = 1 << 46


class PostLink:
    """The jobs of one frontend, on the running loop.

    Parameters
    ----------
    send:
        Sends on the control link; raises Busy where the writer does not read.
    offers:
        Those of the same link: a job may end what an offer's answer has pinned.
    max_bytes:
        Of posted jobs that are kept until they have ended.
    """

    def __init__(self, send: Callable[[Frames], None], offers: Offers, max_bytes: int) -> None:
        self._send = send
        self._offers = offers
        self._posts = Posts(max_bytes, first=_FIRST_POST)
        #: Who waits for a post's outcome, by its token, and the token of the offer that pins what it needs.
        self._waiting: dict[int, tuple[int | None, asyncio.Future[str]]] = {}
        self._again: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._posts)

    def close(self, error: MmprepError) -> None:
        """Keep nothing; whoever waits gets the error."""
        self._carry_out(self._posts.fail_all(error))
        if self._again is not None:
            self._again.cancel()

    # --- the caller's ---------------------------------------------------------------------------------------------

    async def post(
        self,
        post: messages.Post,
        content: Sequence[bytes],
        *,
        offered: Offered | None,
        expires: float,
        deadline: float,
    ) -> str:
        """Post a job to a queue; return its id, or that of the job which an equal request has become.

        Parameters
        ----------
        post:
            With a fresh id. What its places name must be pinned until this returns, unless it brings its items.
        content:
            Its frames.
        offered:
            What pins it; lets go when the job is accepted.
        expires, deadline:
            When it must have been taken, and when it must have been accepted, by the loop's clock.

        Raises
        ------
        ItemsMovedError
            The items that it brings are not where its places say, and nothing was done: they are to be offered.
        MmprepError
            It was not accepted; DeadlineExceeded: not within the time.
        """
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        return await self._post_once(post, content, None if offered is None else offered.token, expires)
                    except ServiceUnavailable as error:
                        if error.retry_after is None:
                            raise
                        await asyncio.sleep(error.retry_after)  # a writer that takes over hears of older jobs first
        except TimeoutError:
            raise DeadlineExceeded("the request's time was over before its job was accepted") from None

    async def _post_once(self, post: messages.Post, content: Sequence[bytes], offer: int | None, expires: float) -> str:
        loop = asyncio.get_running_loop()
        token, actions = self._posts.post(post, content, expires, loop.time())
        future: asyncio.Future[str] = loop.create_future()
        self._waiting[token] = offer, future
        try:
            self._carry_out(actions)
            failpoints.reach("frontend.post.sent")
            return await future
        finally:
            del self._waiting[token]
            self._posts.give_up(token)

    # --- the writer's ---------------------------------------------------------------------------------------------

    def welcomed(self) -> None:
        """A writer has welcomed this frontend: it is told of every job again.

        It is told of pins only after that. So no job ends them: whoever waits lets go when he hears of it.
        """
        self._waiting = {token: (None, future) for token, (_, future) in self._waiting.items()}
        self._carry_out(self._posts.welcomed(asyncio.get_running_loop().time()))

    def down(self) -> None:
        """The connection is gone."""
        self._posts.down()

    def heard(self, message: messages.Posted | messages.Unlike | messages.Finished) -> None:
        """The writer says what has become of jobs."""
        match message:
            case messages.Posted():
                self._carry_out(self._posts.posted(message.call, message.job))
            case messages.Unlike():
                self._carry_out(self._posts.unlike(message.call))
            case messages.Finished():
                self._carry_out(self._posts.finished(message.jobs))

    def failed(self, call: int, error: MmprepError) -> None:
        """The writer has refused a call; it may be a post."""
        self._carry_out(self._posts.failed(call, error, asyncio.get_running_loop().time()))

    def refused(self, error: MmprepError) -> None:
        """The writer has ended the connection over what it was sent."""
        self._carry_out(self._posts.refused(error))

    # --- actions --------------------------------------------------------------------------------------------------

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Say):
                self._say(action)
            else:
                self._settle(action)
        wake_at, loop = self._posts.wake_at, asyncio.get_running_loop()
        if wake_at < math.inf and self._again is None:
            self._again = loop.call_at(wake_at, self._due)

    def _settle(self, settle: Settle) -> None:
        offer, future = self._waiting.get(settle.token, (None, None))
        if offer is not None and not isinstance(settle.outcome, MmprepError):
            self._offers.cancel_silently(offer)  # the writer has let go, with the job, of what it pinned
        if future is None or future.done():
            return
        if isinstance(settle.outcome, MmprepError):
            future.set_exception(settle.outcome)
        else:
            future.set_result(settle.outcome)

    def _say(self, say: Say) -> None:
        message, (offer, _) = say.message, self._waiting.get(say.token, (None, None))
        if offer is not None:
            message = msgspec.structs.replace(message, releases=self._offers.number(offer))
        try:
            self._send([pack(message), *say.content])
        except Busy as error:  # the writer does not read at the moment
            self.failed(message.call, error)

    def _due(self) -> None:
        self._again = None
        self._carry_out(self._posts.tick(asyncio.get_running_loop().time()))
