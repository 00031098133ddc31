"""A page that shows the operator what the service does, live.

The page is one file with nothing from elsewhere; its script asks ``/dashboard/status`` once a second, which is what
``mmprep status --json`` prints. A browser has no way to send a key in a header of its own: this page alone also takes
one as the password of HTTP's basic authentication, and does nothing but read.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Final

PAGE: Final = files("mmprep_frontend.http").joinpath("dashboard.html").read_bytes()
#: The page runs its own script and style, and talks to its own service.
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}
