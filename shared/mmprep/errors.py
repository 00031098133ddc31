"""Every error that mmprep raises to its callers, in one tree.

An error is raised where the fact is known and turned into an HTTP status or a wire message once, at the edge. Its
message is written for the person who sent the request: it says what is wrong and what to change, and never holds a
path, an address of an internal host, or another client's data.

``code`` is the HTTP status, ``type`` the name that the HTTP body carries, ``retryable`` whether the same call may
succeed later, ``param`` the place in the request that is wrong, as ``messages[0].content[1].image_url``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

#: What is said by a Client or a Backend, or a part of one, that was closed.
CLOSED: Final = "this client or backend is closed; make a new one"


class MmprepError(Exception):
    """Something that mmprep tells its caller.

    Parameters
    ----------
    message:
        What is wrong and what to change, one sentence or two.
    param:
        The place in the request, or ``None`` where it is no single place.
    retry_after:
        Seconds after which another try makes sense; only read where ``retryable``.
    """

    code: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def at(self, param: str) -> MmprepError:
        """Return this error with ``param`` set, unless it names a place already."""
        if self.param is None:
            self.param = param
        return self


class InvalidRequest(MmprepError):
    """The request breaks a rule; sending it again will not help."""

    code = 400
    type = "BadRequestError"


class AuthenticationError(MmprepError):
    """No key, or one that is not known."""

    code = 401
    type = "AuthenticationError"


class NotFound(MmprepError):
    """A path, model, alias or registration that does not exist."""

    code = 404
    type = "NotFoundError"


class MethodNotAllowed(MmprepError):
    """The path exists, the method does not."""

    code = 405
    type = "BadRequestError"


class Conflict(InvalidRequest):
    """The same name was given to something else before."""

    code = 409


class MediaError(MmprepError):
    """One medium of the request could not be used; ``param`` names it."""

    code = 422
    type = "UnprocessableEntityError"


class FetchError(MediaError):
    """The medium could not be fetched; its host answered, and refused."""


class FetchBadGateway(FetchError):
    """The medium's host failed (5xx, broken connection, no such name)."""

    code = 502
    type = "BadGatewayError"
    retryable = True


class FetchTimeout(FetchError):
    """The medium's host did not answer in time."""

    code = 504
    type = "TimeoutError"
    retryable = True


class DecodeError(MediaError):
    """The bytes are of a known kind and broken."""


class UnsupportedMedia(MediaError):
    """The bytes are not of a kind that this service reads."""

    code = 415
    type = "UnsupportedMediaError"


class TooLarge(MediaError):
    """The body, the medium or its tensors are above a limit, which the message names."""

    code = 413
    type = "PayloadTooLargeError"


class Forbidden(MediaError):
    """The medium's URL or path is one that this service must not read."""

    code = 400
    type = "BadRequestError"


class Busy(MmprepError):
    """A queue, budget or ring is full at the moment."""

    code = 429
    type = "OverloadedError"
    retryable = True


class DeadlineExceeded(MmprepError):
    """The call's time was over before its answer was there."""

    code = 408
    type = "TimeoutError"
    retryable = True


class StaleAddress(MmprepError):
    """The address names content that is no longer there; ask for it again."""

    code = 404
    type = "NotFoundError"
    retryable = True


class LeaseLost(MmprepError):
    """The lease has ended: released, revoked after its time, or never this owner's."""

    code = 404
    type = "NotFoundError"
    retryable = True


class StaleDelivery(MmprepError):
    """The job was delivered elsewhere since; this acknowledgement is too late."""

    code = 404
    type = "NotFoundError"


class ServiceUnavailable(MmprepError):
    """The service, or the part of it that is needed, is starting, draining or gone."""

    code = 503
    type = "ServiceUnavailableError"
    retryable = True


class ProtocolError(MmprepError):
    """A peer broke the protocol between mmprep's processes."""

    code = 400
    type = "BadRequestError"


class StartupError(MmprepError):
    """A process cannot start as it was told to; the message names the option and what to do."""


class InternalError(MmprepError):
    """A fault of mmprep's own. Its details are in the log, not here."""


def _tree(root: type[MmprepError]) -> dict[str, type[MmprepError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def to_plain(error: MmprepError) -> dict[str, Any]:
    """Return ``error`` as plain data: ``{kind, message, param, retry_after}``, for a message between processes."""
    return {
        "kind": type(error).__name__,
        "message": error.message,
        "param": error.param,
        "retry_after_ms": None if error.retry_after is None else int(error.retry_after * 1000),
    }


def from_plain(kind: str, message: str, param: str | None, retry_after_ms: int | None) -> MmprepError:
    """Return the error that :func:`to_plain` described; an unknown ``kind`` becomes :class:`InternalError`."""
    retry_after = None if retry_after_ms is None else retry_after_ms / 1000
    return _tree(MmprepError).get(kind, InternalError)(message, param=param, retry_after=retry_after)
