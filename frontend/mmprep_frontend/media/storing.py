"""What a media host's headers say about keeping its answer. Pure.

``no-store`` and ``private`` forbid it, ``no-cache`` demands that the host is asked before each use, and ``Vary: *`` says
that the answer is for this one question. How long a medium is fresh is not the host's to say but the operator's
(``--media-cache-ttl``): ``max-age`` and ``Expires`` are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Keeping = Literal["never", "ask", "ttl"]

_DIRECTIVE = re.compile(r'([^\s,;="]+)(?:\s*=\s*(?:"(?:[^"\\]|\\.)*"|[^\s,"]*))?')
_ETAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{0,512}"')
_DATE = re.compile(r"[\x20-\x7e]{1,64}")


@dataclass(frozen=True, slots=True)
class Validators:
    """What a host is asked with whether its medium has changed.

    Attributes
    ----------
    etag, modified: the headers ``ETag`` and ``Last-Modified`` as they came; empty where there was none or a strange one.
    """

    etag: str = ""
    modified: str = ""

    def __bool__(self) -> bool:
        return bool(self.etag or self.modified)

    def condition(self) -> dict[str, str]:
        """Return the headers that ask; RFC 9110 prefers the tag where there are both."""
        if self.etag:
            return {"If-None-Match": self.etag}
        return {"If-Modified-Since": self.modified} if self.modified else {}

    def renewed(self, other: Validators) -> Validators:
        """Return these with what ``other``, of a later 304, says."""
        return Validators(other.etag or self.etag, other.modified or self.modified)


def read_validators(headers: Mapping[str, str]) -> Validators:
    """Return the validators of an answer; one that is too long or not plain ASCII is as none."""
    etag, modified = headers.get("ETag", "").strip(), headers.get("Last-Modified", "").strip()
    return Validators(etag if _ETAG.fullmatch(etag) else "", modified if _DATE.fullmatch(modified) else "")


def keeping(cache_control: str, vary: str, validators: Validators) -> Keeping:
    """Return whether an answer may be kept: never, to be asked about before each use, or for the TTL.

    ``private`` and ``no-cache`` that name fields count as without them, which is the stricter reading.

    Parameters
    ----------
    cache_control, vary:
        All headers of that name, joined with commas.
    validators:
        Of the same answer; what must be asked about, and cannot be, is not kept.
    """
    directives = {found[1].lower() for found in _DIRECTIVE.finditer(cache_control)}
    if directives & {"no-store", "private"} or "*" in (name.strip() for name in vary.split(",")):
        return "never"
    if "no-cache" in directives:
        return "ask" if validators else "never"
    return "ttl"
