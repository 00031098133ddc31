"""Finding the model that a command names: a local directory, or an id on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from mmprep.cli.extra import INSTALL
from mmprep.errors import StartupError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
#: What a frontend and a lane read of a model; never weights.
_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


def find_model(model: str) -> tuple[Path, str]:
    """Return the model's directory and the name under which it is served.

    Raises
    ------
    StartupError
        It is neither a model directory nor to be had from a hub; the message says what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartupError(f"{model} has no config.json; give a model directory in Hugging Face layout")
        return path.resolve(), path.resolve().name
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "/", "~")):
        raise StartupError(
            f"there is no model directory {model}; give one in Hugging Face layout, or a hub id as owner/name"
        )
    return _download(model), model


def _download(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 -- only with the server extra
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415
    except ImportError:
        raise StartupError(f"huggingface_hub cannot be found; {INSTALL}") from None
    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except LocalEntryNotFoundError:
        why = "no hub is reachable and the model is not in the local cache"
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"the hub answered {status}" if status else "the hub could not be read"
    except (OSError, ValueError) as error:
        why = f"the hub could not be read ({type(error).__name__})"
    raise StartupError(
        f"the model {model} could not be downloaded: {why}. Give a local directory instead; its tokenizer and "
        "configuration files suffice, weights are not needed. Private models need a login to the hub"
    )
