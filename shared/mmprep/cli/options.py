"""The options of ``mmprep serve``: one table for the command line, the environment and the TOML file.

The command line wins, then the environment (``MMPREP_CACHE_SIZE``; after it, for some, the variable of the engine that
people come from), then the file that ``--config`` names. A wrong value is an error that names the option.
"""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmprep import embedded
from mmprep.api_keys import ApiKey, read_keys
from mmprep.cli.extra import require_otel
from mmprep.cli.models import find_model
from mmprep.cli.traces import read_endpoint, traces_endpoint
from mmprep.errors import StartupError
from mmprep.remote.curve import check_service_keys
from mmprep.remote.endpoint import TcpEndpoint, tcp_to_bind
from mmprep.sizes import parse_duration, parse_size
from mmprep.supervisor.options import ServeOptions

_DTYPES = ("auto", "uint8", "float32", "bfloat16", "float16")
_HASHES = ("blake3", "sha256")
_LEVELS = ("debug", "info", "warning", "error")
_LIMITS = {"image": 8, "video": 1, "audio": 4}
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
#: What cannot be a host name is refused here; the frontends' URL policy judges the rest.
_DOMAIN = re.compile(r"((\*\.)?[^\s/:*@?#%\\]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")

_QUEUE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_QUEUES = 256
_COLOUR = re.compile(r"#[0-9A-Fa-f]{6}")


class Option(NamedTuple):
    """One option: its name without dashes, how its text is read, its default as text, and its help.

    ``foreign`` is an engine's variable that means the same, and the unit that its number is in; ``also`` is a second name.
    """

    name: str
    read: Callable[[str, str], Any]
    default: str
    help: str
    flag: bool = False
    foreign: tuple[str, str] | None = None
    also: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called."""
        return (self.name,) if self.also is None else (self.name, self.also)


def _text(text: str, _option: str) -> str:
    return text


def _host(text: str, option: str) -> str:
    if not text.strip():
        raise StartupError(f"{option}: give an address; 0.0.0.0 or :: for every one of this machine")
    return text


def _optional(text: str, _option: str) -> str | None:
    return text or None


def _optional_path(text: str, _option: str) -> Path | None:
    return Path(text).absolute() if text else None


def _whole(low: int, high: int) -> Callable[[str, str], int]:
    def read(text: str, option: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise StartupError(f"{option}: {text!r} is no whole number from {low} to {high}")
        return number

    return read


def _size(low: str, high: str) -> Callable[[str, str], int]:
    def read(text: str, option: str) -> int:
        size = parse_size(text, option)
        if not parse_size(low, option) <= size <= parse_size(high, option):
            raise StartupError(f"{option}: {text!r} is not from {low} to {high}")
        return size

    return read


def _optional_size(low: str, high: str) -> Callable[[str, str], int | None]:
    read = _size(low, high)
    return lambda text, option: read(text, option) if text else None


def _duration(low: str, high: str) -> Callable[[str, str], float]:
    def read(text: str, option: str) -> float:
        seconds = parse_duration(text, option)
        if not parse_duration(low, option) <= seconds <= parse_duration(high, option):
            raise StartupError(f"{option}: {text!r} is not from {low} to {high}")
        return seconds

    return read


def _optional_whole(text: str, option: str) -> int | None:
    return _whole(1, 1 << 31)(text, option) if text else None


def _choice(*allowed: str) -> Callable[[str, str], str]:
    def read(text: str, option: str) -> str:
        if text not in allowed:
            raise StartupError(f"{option}: {text!r} is none of {', '.join(allowed)}")
        return text

    return read


def _switch(text: str, option: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise StartupError(f"{option}: {text!r} is neither true nor false")


def _colour(text: str, option: str) -> tuple[int, int, int] | None:
    """Return red, green and blue; ``None`` for ``none``."""
    if text.lower() == "none":
        return None
    if not _COLOUR.fullmatch(text):
        raise StartupError(f"{option}: {text!r} is no colour; give it as #rrggbb in hex digits, or none")
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def _limits(text: str, option: str) -> dict[str, int]:
    """Return the limits by modality; one that is not named keeps its default."""
    limits = dict(_LIMITS)
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        modality, equals, number = part.partition("=")
        if modality not in _LIMITS or not equals:
            raise StartupError(f"{option}: {part!r} is not of the form image=8,video=1,audio=4")
        limits[modality] = _whole(0, 256)(number, option)
    return limits


def _domains(text: str, option: str) -> tuple[str, ...]:
    domains = tuple(filter(None, (piece.strip() for piece in text.split(","))))
    for domain in domains:
        if not _DOMAIN.fullmatch(domain):
            raise StartupError(
                f"{option}: {domain!r} is no host name; give names as a.example, or *.b.example for all below, each with "
                "or without a port"
            )
    return domains


def _queues(text: str, option: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(filter(None, (piece.strip() for piece in text.split(",")))))
    for name in names:
        if not _QUEUE.fullmatch(name) or name == "media":
            raise StartupError(
                f"{option}: {name!r} is no name of a queue; give 1 to 64 letters, digits, '_', '.' and '-', and not 'media'"
            )
    if len(names) > _MOST_QUEUES:
        raise StartupError(f"{option}: there are at most {_MOST_QUEUES} queues")
    return names


def _directory(text: str, option: str) -> str | None:
    """Return the absolute path of a directory that exists."""
    if not text:
        return None
    if "\0" in text or not Path(text).is_dir():
        raise StartupError(f"{option}: {text!r} is no directory")
    return str(Path(text).absolute())


def _keys(text: str, option: str) -> tuple[ApiKey, ...]:
    return read_keys(Path(text), option) if text else ()


def _listens(text: str, option: str) -> TcpEndpoint | None:
    return tcp_to_bind(text, option) if text else None


OPTIONS = (
    Option("host", _host, "127.0.0.1", "address to listen on"),
    Option("port", _whole(0, 65535), "8790", "port to listen on; 0: a free one"),
    Option("frontends", _whole(1, 256), "2", "frontend processes, which share the port"),
    Option("lanes", _whole(0, 256), "0", "processes that decode; 0: one a core, at least 2"),
    Option("lane-memory", _size("64MiB", "1TiB"), "4GiB", "memory that one lane may use, without the cache"),
    Option("task-timeout", _duration("100ms", "1d"), "25s", "longest time for one medium in a lane"),
    Option("cache-size", _size("1MiB", "64TiB"), "1GiB", "shared memory for processed items"),
    Option("max-object-size", _text, "", "largest item in the ring; default, and most: a quarter of it"),
    Option("spill-size", _optional_size("0", "64TiB"), "", "more of it for what finds no room; default: half as much"),
    Option(
        "inline-size", _size("0", "64TiB"), "256MiB", "tensors that travel because no shared memory is free; 0: none"
    ),
    Option("runtime-dir", _optional, "", "directory for sockets and locks; default: $XDG_RUNTIME_DIR/mmprep"),
    Option("served-model-name", _optional, "", "name of the model in requests; default: the directory's"),
    Option(
        "limit-mm-per-prompt",
        _limits,
        ",".join(f"{modality}={limit}" for modality, limit in _LIMITS.items()),
        "media a request, by modality; one that is not named keeps its default",
    ),
    Option("max-model-len", _optional_whole, "", "tokens of prompt and answer; default: the model's"),
    Option("tensor-dtype", _choice(*_DTYPES), "auto", "dtype of tensors where a request names none"),
    Option("hash", _choice(*_HASHES), "blake3", "hash of the media's bytes"),
    Option("lease-seconds", _duration("100ms", "1d"), "30s", "how long a lease holds without renewal"),
    Option("queue-limit", _whole(1, 1_000_000), "1024", "media that may wait or be in work"),
    Option("queues", _queues, "", "queues of jobs that are there before a backend pulls from them: engine-0,engine-1"),
    Option("queue-jobs", _whole(1, 1_000_000), "1024", "jobs in one queue, delivered ones included"),
    Option("queue-size", _size("1MiB", "64GiB"), "64MiB", "jobs of all queues, without their tensors"),
    Option("job-timeout", _duration("100ms", "1d"), "60s", "time from a job's delivery to its acknowledgement"),
    Option("job-expiry", _duration("100ms", "30d"), "5min", "time in which a queued job must be taken"),
    Option("job-attempts", _whole(1, 1000), "3", "failed deliveries after which a job is given up"),
    Option("request-timeout", _duration("100ms", "1d"), "60s", "longest time for one request"),
    Option("drain-timeout", _duration("0s", "1d"), "10s", "time for requests under way when the service stops"),
    Option("max-media-size", _size("1KiB", "64GiB"), "256MiB", "largest medium, encoded"),
    Option("max-request-media-size", _size("1KiB", "64TiB"), "512MiB", "all media of one request, encoded"),
    Option("max-body-size", _size("1KiB", "64GiB"), "384MiB", "largest request body"),
    Option("max-image-pixels", _whole(1, 1 << 31), "178956970", "most pixels of one picture, or of a video's frame"),
    Option("max-request-image-pixels", _whole(1, 1 << 40), "500000000", "pixels of all pictures of one request"),
    Option(
        "image-background", _colour, "#ffffff", "colour that transparency of pictures is put on; none: it is dropped"
    ),
    Option("max-video-frames", _whole(1, 1 << 16), "768", "most frames of one video that are processed"),
    Option("max-video-duration", _duration("1s", "1d"), "1h", "longest video"),
    Option("max-audio-duration", _duration("1s", "1d"), "1h", "longest recording"),
    Option("allowed-media-domains", _domains, "", "only fetch media from these: a.example,*.b.example:443"),
    Option("allow-private-networks", _switch, "false", "fetch media from private addresses too", flag=True),
    Option(
        "allowed-local-media-path", _directory, "", "read media at file:// URLs below this directory; default: none"
    ),
    Option(
        "media-cache-dir",
        _optional_path,
        "",
        "directory of the disk cache of fetched media; default: none",
        foreign=("VLLM_MEDIA_CACHE", ""),
    ),
    Option(
        "media-cache-max-size",
        _size("1MiB", "64TiB"),
        "5GiB",
        "most bytes of the disk cache",
        foreign=("VLLM_MEDIA_CACHE_MAX_SIZE_MB", "MiB"),
    ),
    Option(
        "media-cache-ttl",
        _duration("0s", "3650d"),
        "24h",
        "how long its media are used without asking their hosts again",
        foreign=("VLLM_MEDIA_CACHE_TTL_HOURS", "h"),
    ),
    Option(
        "trust-request-mm-kwargs",
        _switch,
        "false",
        "let requests say how media are read and processed (media_io_kwargs, mm_processor_kwargs)",
        flag=True,
    ),
    Option("api-key-file", _keys, "", "file with the keys of clients, one a line; default: everybody may ask"),
    Option("admin-key-file", _keys, "", "file with the operator's keys"),
    Option("share-cache-across-keys", _switch, "false", "let clients with different keys share the cache", flag=True),
    Option(
        "trust-request-chat-template",
        _switch,
        "false",
        "let requests bring their own chat template, or name one of the model's",
        flag=True,
    ),
    Option("enable-injection", _switch, "false", "take items that were processed elsewhere into the cache", flag=True),
    Option("chat-template", _optional, "", "file with a chat template in place of the model's"),
    Option(
        "otlp-traces-endpoint",
        read_endpoint,
        "",
        "URL that traces are sent to, by OTLP over HTTP; default: what OTEL_EXPORTER_OTLP_ENDPOINT and its like say",
    ),
    Option(
        "remote-endpoint",
        _listens,
        "",
        "address for backends on other hosts, as tcp://10.0.0.5:7790; default: none are served",
        also="zmq-bind",
    ),
    Option(
        "curve-key-file",
        _optional_path,
        "",
        "file with the secret key that backends on other hosts know the service by",
    ),
    Option("curve-clients-dir", _optional_path, "", "directory with the public keys of those who may connect, *.pub"),
    Option(
        "allow-plain-remote",
        _switch,
        "false",
        "let backends on other hosts connect without keys and encryption: everybody who reaches the address",
        flag=True,
    ),
    Option("log-format", _choice("text", "json"), "text", "one line of text or one JSON object an event"),
    Option("log-level", _choice(*_LEVELS), "warning", "debug, info, warning or error"),
)


def parser(command: str, description: str, names: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Return a parser with options of ``serve``; values are read later, by :func:`resolve` or :func:`read`.

    Parameters
    ----------
    names:
        Of the options, without dashes; ``None``: all.
    """
    made = argparse.ArgumentParser(prog=f"mmprep {command}", description=description)
    made.add_argument("--config", help="TOML file with options, by the same names")
    for option in OPTIONS:
        if names is not None and option.name not in names:
            continue
        default = f" (default: {option.default})" if option.default and not option.flag else ""
        text = (option.help + default).replace("%", "%%")
        if option.flag:
            made.add_argument(f"--{option.name}", action="store_const", const="true", help=text)
        else:
            flags = [f"--{name}" for name in option.names]
            made.add_argument(*flags, help=text, metavar=option.name.rpartition("-")[2].upper())
    return made


def resolve(
    arguments: argparse.Namespace, model: str | None, environment: Mapping[str, str] = os.environ
) -> ServeOptions:
    """Return the decided options.

    Parameters
    ----------
    arguments:
        From :func:`parser`.
    model:
        A directory, a hub id, or ``None`` for the embedded model.

    Raises
    ------
    StartupError
        A value is wrong, the file cannot be read, the model is not there, or an extra is missing.
    """
    values = read(arguments, environment)
    values["otlp_traces_endpoint"] = traces_endpoint(values["otlp_traces_endpoint"], environment)
    if values["otlp_traces_endpoint"] is not None:
        require_otel()
    return _decide(values, model)


def read(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the values of the options that :func:`parser` made, by name, with underscores.

    Raises
    ------
    StartupError
        A value is wrong, or the file cannot be read.
    """
    file = _read_file(arguments.config or environment.get("MMPREP_CONFIG"))
    values = {}
    for option in OPTIONS:
        name = option.name.replace("-", "_")
        if not hasattr(arguments, name):
            continue
        given, label = getattr(arguments, name), f"--{option.name}"
        for variable in (f"MMPREP_{each.replace('-', '_').upper()}" for each in option.names):
            given = environment.get(variable) if given is None else given
        if given is None and option.foreign is not None:
            variable, unit = option.foreign
            if environment.get(variable, "").strip():
                given, label = f"{environment[variable].strip()}{unit}", f"{label} ({variable})"
        if given is None:
            given = file.get(option.name)
        values[name] = option.read(option.default if given is None else given, label)
    return values


def _read_file(path: str | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        plain = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"--config: {path} cannot be read: {error}") from None
    known = {name: option.name for option in OPTIONS for name in option.names}
    texts = {}
    for name, value in plain.items():
        dashed = name.replace("_", "-")
        if dashed not in known:
            raise StartupError(f"--config: {path} has an unknown option {name!r}")
        texts[known[dashed]] = _as_text(value)
    return texts


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return ",".join(f"{key}={number}" for key, number in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)


def _decide(values: dict[str, Any], model: str | None) -> ServeOptions:
    cache_size = values["cache_size"]
    largest = values["max_object_size"]
    largest = cache_size // 4 if not largest else parse_size(largest, "--max-object-size")
    if not 4096 <= largest <= cache_size // 4:
        raise StartupError("--max-object-size: it must be from 4KiB to a quarter of --cache-size")
    directory, name = (embedded.path(), "mmprep-demo") if model is None else find_model(model)
    values["max_object_size"] = largest
    if values["spill_size"] is None:
        values["spill_size"] = cache_size // 2
    values["lanes"] = max(2, values["lanes"] or len(os.sched_getaffinity(0)))
    values["model"] = directory
    values["served_model_name"] = values["served_model_name"] or name
    values["runtime_dir"] = Path(values["runtime_dir"]) if values["runtime_dir"] else None
    values["chat_template"] = _read_template(values["chat_template"])
    check_service_keys(
        values["remote_endpoint"],
        values["curve_key_file"],
        values["curve_clients_dir"],
        allow_plain=values["allow_plain_remote"],
    )
    return ServeOptions(**values)


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--chat-template: {path} cannot be read: {error}") from None
