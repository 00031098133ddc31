"""Logs of every process: one line an event on standard error, as text or as a JSON object.

What belongs to a request carries its id, whichever module writes the line: the door that takes the request sets
:data:`request_id`, which tasks that it starts inherit. Lines hold no content of requests, no URL and no key.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
from contextvars import ContextVar
from typing import Any, Final, Literal

import msgspec

Format = Literal["text", "json"]

#: The id of the request that is being worked on.
request_id: ContextVar[str | None] = ContextVar("mmprep_request_id", default=None)

#: Where :func:`event` keeps its fields in a record.
_FIELDS: Final = "mmprep_fields"


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a process logs: ``--log-level`` and ``--log-format``."""

    level: Literal["debug", "info", "warning", "error"]
    format: Format

    def apply(self) -> None:
        """Set this process's logging up."""
        handler = logging.StreamHandler()
        handler.setFormatter(_Json() if self.format == "json" else _Text())
        logging.basicConfig(level=self.level.upper(), handlers=[handler], force=True)


def event(logger: logging.Logger, level: int, message: str, **fields: Any) -> None:
    """Log an event with named values, which JSON lines have as fields and text lines behind the message.

    Parameters
    ----------
    fields:
        Of texts and numbers; those that are ``None`` are left out.
    """
    logger.log(level, message, extra={_FIELDS: {name: value for name, value in fields.items() if value is not None}})


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    named = request_id.get()
    found: dict[str, Any] = {} if named is None else {"request_id": named}
    return found | getattr(record, _FIELDS, {})


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, an override
        line = super().formatMessage(record)
        return " ".join((line, *(f"{name}={value}" for name, value in _fields(record).items())))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = dt.datetime.fromtimestamp(record.created, dt.UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": os.getpid(),
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()
