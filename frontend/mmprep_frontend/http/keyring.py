"""Who asks: from a request's key to its principal.

Without keys everybody is anonymous and may do everything. With keys, what needs one is answered with 401 where there is
none or a wrong one; what only the operator may do needs an admin key, which is good for everything else too.

Every configured key is compared, in constant time, whatever was sent: how long it takes tells nothing.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

from mmprep.api_keys import ApiKey, digest_of
from mmprep.errors import AuthenticationError
from mmprep_frontend.caller import ANONYMOUS

#: What a route asks for: nothing, any key, an admin key, or an admin key that a browser may send as a password.
Need: TypeAlias = Literal["nothing", "key", "admin", "page"]

_LONGEST: Final = 1024
_SCHEME: Final = "bearer "
_BASIC: Final = "basic "


class Keyring:
    """The keys of a service.

    Parameters
    ----------
    keys:
        For requests; empty where everybody may send some.
    admin_keys:
        For the operator.
    shared:
        Whether all principals share one cache, ``--share-cache-across-keys``.
    """

    def __init__(self, keys: Sequence[ApiKey] = (), admin_keys: Sequence[ApiKey] = (), *, shared: bool = False) -> None:
        self._keys = tuple(keys)
        self._admin_keys = tuple(admin_keys)
        self._shared = shared

    def admit(self, headers: Mapping[str, str], need: Need) -> str:
        """Return whose cache a request uses.

        Parameters
        ----------
        headers:
            Of the request. A key comes as ``Authorization: Bearer <key>`` or as ``X-Api-Key: <key>``.
        need:
            What its route asks for.

        Raises
        ------
        mmprep.errors.AuthenticationError
            The key is missing, wrong, or not an admin's.
        """
        if need == "nothing" or not (self._keys or self._admin_keys):
            return ANONYMOUS
        digest = digest_of(_presented(headers, password=need == "page"))
        admin, principal = _owner(self._admin_keys, digest), _owner(self._keys, digest)
        if admin is None and need in {"admin", "page"}:
            if not self._admin_keys:
                raise AuthenticationError("this needs an admin key, and the service has none (--admin-key-file)")
            raise (PasswordError if need == "page" else AuthenticationError)(
                "this needs an admin key: send one as 'Authorization: Bearer <key>'"
            )
        if admin is None and principal is None and self._keys:
            raise AuthenticationError("the API key is missing or wrong: send it as 'Authorization: Bearer <key>'")
        owner = principal or admin
        return ANONYMOUS if owner is None or self._shared else owner

    def sender(self, headers: Mapping[str, str]) -> str:
        """Return whose an admitted request is, whoever uses the same cache."""
        digest = digest_of(_presented(headers, password=False))
        return _owner(self._keys, digest) or _owner(self._admin_keys, digest) or ANONYMOUS

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Whether a request has a key that is good for requests, or needs none."""
        try:
            self.admit(headers, "key")
        except AuthenticationError:
            return False
        return True


class PasswordError(AuthenticationError):
    """A browser may ask its user for the key."""


def _presented(headers: Mapping[str, str], *, password: bool) -> str:
    authorization = headers.get("Authorization", "").strip()
    if password and authorization[: len(_BASIC)].lower() == _BASIC:
        try:
            pair = base64.b64decode(authorization[len(_BASIC) :][:_LONGEST], validate=True).decode()
        except ValueError:
            return ""
        return pair.partition(":")[2]
    if authorization[: len(_SCHEME)].lower() == _SCHEME:
        return authorization[len(_SCHEME) :].strip()[:_LONGEST]
    return headers.get("X-Api-Key", "").strip()[:_LONGEST]


def _owner(keys: Sequence[ApiKey], digest: str) -> str | None:
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key.principal
    return found
