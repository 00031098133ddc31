"""Where what stands in a converted request stood in the one that was sent.

A request of another API is converted into a chat request, and errors name places in that. The sender knows none of them,
so they are translated back at the end, by the longest place that is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from mmprep.errors import MmprepError
from mmprep_frontend.render.requests import ChatRequest


@dataclass(frozen=True)
class Places:
    """Places of the request that was sent, by those of the converted one."""

    known: Mapping[str, str] = field(default_factory=dict)

    def original(self, param: str | None) -> str | None:
        """Return the place that was sent, for one in the converted request.

        Examples
        --------
        >>> Places({"messages[1]": "input[3]"}).original("messages[1].content[0].image_url")
        'input[3].content[0].image_url'
        """
        if param is None:
            return None
        known = param
        while known:
            if known in self.known:
                return self.known[known] + param[len(known) :]
            known = known[: max(known.rfind("."), known.rfind("["), 0)]
        return param

    @contextmanager
    def renaming(self) -> Iterator[None]:
        """Let errors of the block name the places that were sent."""
        try:
            yield
        except MmprepError as error:
            error.param = self.original(error.param)
            raise


@dataclass(frozen=True)
class Asked:
    """A chat request, and where it comes from."""

    request: ChatRequest
    places: Places = Places()
