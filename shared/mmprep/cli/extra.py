"""What the extras ``server`` and ``otel`` install, and whether it is there."""

from __future__ import annotations

import importlib.util

from mmprep.errors import StartupError

INSTALL = "install the server's dependencies: pip install 'mmprep[server]'"

#: The module and its distribution.
SERVER_MODULES = (
    ("aiohttp", "aiohttp"),
    ("uvloop", "uvloop"),
    ("transformers", "transformers"),
    ("jinja2", "jinja2"),
    ("PIL", "pillow"),
    ("simplejpeg", "simplejpeg"),
    ("soundfile", "soundfile"),
    ("soxr", "soxr"),
    ("av", "av"),
    ("blake3", "blake3"),
    ("pybase64", "pybase64"),
    ("prometheus_client", "prometheus-client"),
)

OTEL_MODULES = (
    ("opentelemetry.sdk", "opentelemetry-sdk"),
    ("opentelemetry.exporter.otlp.proto.http", "opentelemetry-exporter-otlp-proto-http"),
)


def require_server() -> None:
    """Refuse to start where a distribution of the extra is not installed; imports none of them.

    Raises
    ------
    StartupError
        The message names what is missing and says what to do.
    """
    missing = [distribution for module, distribution in SERVER_MODULES if not _is_installed(module)]
    if missing:
        raise StartupError(f"{', '.join(missing)} cannot be found; {INSTALL}")


def require_otel() -> None:
    """Refuse to start with traces where the extra ``otel`` is not installed; imports nothing of it.

    Raises
    ------
    StartupError
        The message names what is missing and says what to do.
    """
    missing = [distribution for module, distribution in OTEL_MODULES if not _is_installed(module)]
    if missing:
        raise StartupError(
            f"traces are asked for (--otlp-traces-endpoint, OTEL_…), and {', '.join(missing)} cannot be found; install "
            "what they need: pip install 'mmprep[server,otel]'"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
