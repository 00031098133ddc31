"""Where traces go: the option, else what OpenTelemetry's standard variables say.

``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` is taken as it is, ``OTEL_EXPORTER_OTLP_ENDPOINT`` with ``/v1/traces`` behind it.
``OTEL_TRACES_EXPORTER=otlp`` alone means a collector on this machine, ``none`` and ``OTEL_SDK_DISABLED=true`` no traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from mmprep.errors import StartupError

_LOCAL = "http://localhost:4318"
_PATH = "/v1/traces"
_PROTOCOL = "http/protobuf"


def traces_endpoint(given: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the URL that traces are posted to, ``None`` where nothing is traced.

    Parameters
    ----------
    given:
        The option's value, from :func:`read_endpoint`.

    Raises
    ------
    StartupError
        A variable is wrong; the message names it.
    """
    said = {name: value.strip() for name, value in environment.items() if name.startswith("OTEL_") and value.strip()}
    if given:
        return given
    exporter = said.get("OTEL_TRACES_EXPORTER", "").lower()
    if exporter == "none" or said.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if exporter not in {"", "otlp"}:
        raise StartupError(f"OTEL_TRACES_EXPORTER: {exporter!r} is not known here; otlp and none are")
    whole, base = said.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), said.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not (exporter or whole or base):
        return None
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if name in said:
            if said[name] != _PROTOCOL:
                raise StartupError(f"{name}: {said[name]!r} is not spoken here; set {_PROTOCOL}")
            break
    if whole:
        return _url(whole, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return _url((base or _LOCAL).rstrip("/") + _PATH, "OTEL_EXPORTER_OTLP_ENDPOINT")


def read_endpoint(text: str, option: str) -> str | None:
    """Return an option's URL, ``None`` where it is empty; raises StartupError."""
    return _url(text, option) if text else None


def _url(text: str, name: str) -> str:
    try:
        parts = urlsplit(text)
        right = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        right = False
    if not right:
        raise StartupError(f"{name}: give an http or https URL, as http://collector:4318/v1/traces")
    return text
