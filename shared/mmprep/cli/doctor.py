"""``mmprep doctor``: what a service would trip over on this machine, each with what to do about it.

Every check is a function that yields findings and changes nothing on the machine. A *fail* keeps the service, or the
model that was named, from working; a *warn* makes it slower or poorer. Nothing here connects to anything.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmprep.cli.extra import INSTALL, SERVER_MODULES
from mmprep.errors import StartupError
from mmprep.layout import Geometry
from mmprep.runtime import RuntimeDir, default_path
from mmprep.segment import SHM_DIRECTORY, free_space
from mmprep.sizes import format_size, parse_size

#: Kinds of pictures, Pillow's name of what reads them, and how bad it is if they cannot be read.
PICTURE_KINDS: tuple[tuple[str, str, Literal["warn", "fail"]], ...] = (
    ("JPEG", "jpg", "fail"),
    ("PNG", "zlib", "fail"),
    ("WebP", "webp", "warn"),
    ("AVIF", "avif", "warn"),
)

#: Codecs of videos, and FFmpeg's names of what reads them.
VIDEO_CODECS = (
    ("H.264", "h264"),
    ("HEVC", "hevc"),
    ("VP8", "vp8"),
    ("VP9", "vp9"),
    ("AV1", "libdav1d"),
    ("MPEG-4", "mpeg4"),
)

#: Open files a service of many clients needs: a connection is one, and so is a medium on its way.
WANTED_FILES = 4096

#: Bytes that processes need beside the ring, roughly: two frontends and two lanes with a model's tokenizer each.
BESIDE_RING = 2 * 2**30


class Finding(NamedTuple):
    """One line of the report; ``advice`` says what to do, and is empty where nothing need be done."""

    status: Literal["ok", "warn", "fail"]
    what: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<4}  {self.what:<18} {self.detail}"
        return f"{line} — {self.advice}" if self.advice else line


def run(argv: list[str]) -> int:
    """Check this machine, print the findings, and return 1 where one of them is a *fail*, else 0.

    Parameters
    ----------
    argv:
        The arguments behind ``mmprep doctor``.
    """
    parser = argparse.ArgumentParser(
        prog="mmprep doctor", description="Check whether this machine can run the service."
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model directory to check, too")
    parser.add_argument(
        "--cache-size", default="1GiB", metavar="SIZE", help="of the ring, as given to serve (default: %(default)s)"
    )
    parser.add_argument("--runtime-dir", metavar="DIR", help=f"as given to serve (default: {default_path()})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    try:
        cache_size = parse_size(options.cache_size, "--cache-size")
    except StartupError as error:
        parser.error(error.message)

    findings = []
    for finding in _all_checks(RuntimeDir(options.runtime_dir or default_path()), cache_size, options.model):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    failed = any(finding.status == "fail" for finding in findings)
    if options.json:
        print(json.dumps({"ok": not failed, "findings": [finding._asdict() for finding in findings]}, indent=2))
    return int(failed)


def _all_checks(runtime: RuntimeDir, cache_size: int, model: str | None) -> Iterator[Finding]:
    ring_size = _ring_size(cache_size)
    yield check_python()
    yield check_cpus()
    yield from check_limits(ring_size)
    runs_here = False
    for finding in check_runtime_dir(runtime):
        runs_here = runs_here or finding.what == "service"
        yield finding
    yield check_shared_memory(ring_size, runs_here)
    yield check_memory(ring_size, runs_here)
    yield from check_stray_segments(runtime)
    yield from check_server_modules()
    yield from check_codecs()
    yield check_kernel()
    if model is not None:
        yield from check_model(model)


def _ring_size(cache_size: int) -> int:
    """Return the bytes of the segment that a service makes: its directory lies beside the cache."""
    try:
        return Geometry.for_ring(cache_size).total_size
    except ValueError:  # larger than serve takes: no machine has that much
        return cache_size


def check_python() -> Finding:
    """Name the interpreter; one that is too old cannot read this file."""
    return Finding("ok", "python", f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")


def check_cpus() -> Finding:
    """Check that lanes have processors to run on; a container's quota counts."""
    cpus: float = len(os.sched_getaffinity(0))
    detail = f"{cpus} usable"
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[0]) < cpus * int(quota[1]):
        cpus = int(quota[0]) / int(quota[1])
        detail += f", a quota of {cpus:g} of them"
    if cpus < 2:
        return Finding(
            "warn", "cpus", detail, "give the service two or more; with one, slow media hold up everything else"
        )
    return Finding("ok", "cpus", detail)


def check_limits(ring_size: int) -> Iterator[Finding]:
    """Check the limits of this process that its children inherit."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < WANTED_FILES:
        reach = WANTED_FILES if most == resource.RLIM_INFINITY else min(WANTED_FILES, most)
        advice = (
            f"raise it: ulimit -n {reach}"
            if reach > files
            else "raise the hard limit (systemd: LimitNOFILE=, Docker: --ulimit nofile=)"
        )
        yield Finding("warn", "open files", f"at most {files}, {WANTED_FILES} are wanted for many clients", advice)
    else:
        yield Finding("ok", "open files", f"at most {'any number' if files == resource.RLIM_INFINITY else files}")
    for name, what, flag in (("RLIMIT_AS", "address space", "-v"), ("RLIMIT_FSIZE", "file size", "-f")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and limit < ring_size:
            yield Finding(
                "fail",
                what,
                f"limited to {format_size(limit)}, the ring needs {format_size(ring_size)}",
                f"lift it: ulimit {flag} unlimited",
            )


def check_runtime_dir(runtime: RuntimeDir) -> Iterator[Finding]:
    """Check the directory of the sockets; a finding named ``service`` says that a service runs there."""
    try:
        runtime.check()
    except StartupError as error:
        detail, _, advice = error.message.partition("; ")
        yield Finding("fail", "runtime directory", detail, advice)
        return
    yield Finding("ok", "runtime directory", f"{runtime.path}{'' if runtime.path.exists() else ' (will be made)'}")
    pid = runtime.service_pid()
    if pid is not None:
        yield Finding("ok", "service", f"runs in this directory, {f'pid {pid}' if pid else 'in another container'}")


def check_shared_memory(ring_size: int, runs_here: bool) -> Finding:
    """Check that the ring fits into /dev/shm; the ring of a running service has its memory already."""
    what = "shared memory"
    try:
        space = free_space()
    except StartupError as error:
        detail, _, advice = error.message.partition("; ")
        return Finding("fail", what, detail, advice)
    if space is None:
        return Finding("ok", what, f"{SHM_DIRECTORY} has no limit")
    free, total = space
    detail = f"{SHM_DIRECTORY} has {format_size(free)} free of {format_size(total)}"
    if free < ring_size and not runs_here:
        return Finding(
            "fail",
            what,
            f"{detail}, the ring needs {format_size(ring_size)}",
            f"give serve a --cache-size of at most {max(0, 2 * free - _ring_size(free)) // 2**20}MiB, or make the mount larger: mount -o remount,size=… /dev/shm, in Docker --shm-size",
        )
    if free < ring_size + ring_size // 2 and not runs_here:
        return Finding(
            "warn",
            what,
            f"{detail}: no room for spills beside the ring",
            "none is needed; items that find no room in the ring then travel with the answer. Else make the mount larger, or give serve a smaller --cache-size",
        )
    return Finding("ok", what, detail)


def check_memory(ring_size: int, runs_here: bool) -> Finding:
    """Check that there is memory behind /dev/shm: its size promises none, and the ring is touched whole at the start."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit.isdigit() and used.isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    detail = f"{format_size(free)} free"
    if runs_here:
        return Finding("ok", "memory", detail)
    if free < ring_size:
        advice = "give serve a smaller --cache-size, or this machine or container more memory"
        return Finding("fail", "memory", f"{detail}, the ring needs {format_size(ring_size)}", advice)
    if free < ring_size + BESIDE_RING:
        advice = "give serve a smaller --cache-size if processes are killed for memory"
        return Finding("warn", "memory", f"{detail}: little beside a ring of {format_size(ring_size)}", advice)
    return Finding("ok", "memory", detail)


def check_stray_segments(runtime: RuntimeDir) -> Iterator[Finding]:
    """Report this user's segments of other runtime directories: of other services, or left by ones that are gone."""
    mine = f"mmprep-{os.geteuid()}-"
    here = f"{mine}{runtime.runtime_id}-" if runtime.path.exists() else None
    strays, size = [], 0
    for entry in sorted(SHM_DIRECTORY.glob(f"{mine}*")):
        if here is None or not entry.name.startswith(here):
            with contextlib.suppress(FileNotFoundError):  # its service has just stopped
                size += entry.stat().st_blocks * 512
                strays.append(str(entry))
    if strays:
        yield Finding(
            "warn",
            "other segments",
            f"{len(strays)} of other runtime directories hold {format_size(size)}",
            f"if no other service of this user runs, remove them: rm {' '.join(strays[:8])}",
        )


def check_server_modules() -> Iterator[Finding]:
    """Import everything that the extra ``server`` installs."""
    # Read at import: says in a line of its own that there is no torch, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    missing = []
    for module, distribution in SERVER_MODULES:
        error = _import_error(module)
        if error is not None:
            missing.append(distribution)
            yield Finding("fail", "server extra", f"{distribution}: {error}", INSTALL)
    if not missing:
        versions = (f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "pillow"))
        yield Finding("ok", "server extra", f"complete ({', '.join(versions)})")


def check_codecs() -> Iterator[Finding]:
    """Check which kinds of pictures Pillow was built to read, and which codecs of videos FFmpeg."""
    yield from _check_pictures()
    yield from _check_videos()


def _check_pictures() -> Iterator[Finding]:
    if _import_error("PIL") is not None:
        return
    from PIL import features  # noqa: PLC0415 - part of the server extra, which is what is being checked

    readable = [kind for kind, feature, _ in PICTURE_KINDS if features.check(feature)]
    yield Finding("ok", "codecs", ", ".join(readable))
    for kind, _, status in PICTURE_KINDS:
        if kind not in readable:
            advice = "install Pillow from a wheel: pip install --force-reinstall --only-binary :all: pillow"
            yield Finding(status, "codecs", f"Pillow cannot read {kind}; such pictures will be refused", advice)


def _check_videos() -> Iterator[Finding]:
    if _import_error("av") is not None:
        return
    import av  # noqa: PLC0415 - as above

    readable = [codec for codec, name in VIDEO_CODECS if name in av.codecs_available]
    yield Finding("ok", "video codecs", f"{', '.join(readable)} (av {av.__version__})")
    for codec, name in VIDEO_CODECS:
        if name not in av.codecs_available:
            advice = "install PyAV from a wheel: pip install --force-reinstall --only-binary :all: av"
            yield Finding("warn", "video codecs", f"FFmpeg cannot read {codec}; such videos will be refused", advice)


def check_kernel() -> Finding:
    """Say which kernel will resample pictures."""
    error = _import_error("numba")
    if error is not None:
        return Finding("warn", "kernel", f"Pillow's resampling (numba: {error})", f"about half as fast; {INSTALL}")
    return Finding("ok", "kernel", f"compiled resampling (numba {importlib.metadata.version('numba')})")


def check_model(model: str) -> Iterator[Finding]:
    """Check a model directory: what the service reads of it. Weights are not needed."""
    directory = Path(model)
    if not directory.is_dir():
        if directory.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
            yield Finding(
                "fail", "model", f"{model} is not a directory", "give a directory in Hugging Face layout, or a hub id"
            )
        else:
            yield Finding(
                "warn",
                "model",
                f"{model} is not here; serve will take it for a hub id",
                "give a local directory to check it",
            )
        return
    config = _json_object(directory / "config.json")
    if isinstance(config, str):
        yield Finding("fail", "model", f"config.json {config}", "give the directory that holds the model's config.json")
    elif not isinstance(config.get("model_type"), str):
        yield Finding("fail", "model", "config.json names no model_type", "copy it from the published model again")
    else:
        yield Finding("ok", "model", f"model_type {config['model_type']}")
    yield _check_tokenizer(directory)
    yield _check_processor(directory)
    yield _check_chat_template(directory)


def _check_tokenizer(directory: Path) -> Finding:
    tokenizer = _json_object(directory / "tokenizer.json")
    if isinstance(tokenizer, str):
        others = [
            name for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json") if (directory / name).exists()
        ]
        if others and tokenizer == "is missing":
            return Finding(
                "warn",
                "tokenizer",
                f"no tokenizer.json, only {others[0]}: it is converted at each start",
                "save it once with the fast tokenizer's save_pretrained",
            )
        return Finding(
            "fail",
            "tokenizer",
            f"tokenizer.json {tokenizer}",
            "copy the tokenizer files of the published model into the directory",
        )
    return Finding("ok", "tokenizer", "tokenizer.json")


def _check_processor(directory: Path) -> Finding:
    for name in ("processor_config.json", "preprocessor_config.json"):
        config = _json_object(directory / name)
        if config == "is missing":
            continue
        if isinstance(config, str):
            return Finding("fail", "processor", f"{name} {config}", "copy it from the published model again")
        parts = (config, config.get("image_processor"), config.get("feature_extractor"))
        kinds = [
            part.get("image_processor_type") or part.get("feature_extractor_type")
            for part in parts
            if isinstance(part, dict)
        ]
        kind = next((kind for kind in kinds if kind), config.get("processor_class"))
        return Finding("ok", "processor", f"{name}{f' ({kind})' if isinstance(kind, str) else ''}")
    return Finding(
        "fail",
        "processor",
        "no preprocessor_config.json",
        "copy it from the published model; one that takes no media is not served",
    )


def _check_chat_template(directory: Path) -> Finding:
    for name in ("chat_template.jinja", "chat_template.json"):
        if (directory / name).exists():
            return Finding("ok", "chat template", name)
    config = _json_object(directory / "tokenizer_config.json")
    if not isinstance(config, str) and config.get("chat_template"):
        return Finding("ok", "chat template", "in tokenizer_config.json")
    return Finding("warn", "chat template", "none: chat requests will be refused", "give serve a --chat-template FILE")


def _json_object(path: Path) -> dict[str, Any] | str:
    """Return the object in the file, or what is wrong with the file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError:
        return "is not JSON"
    return content if isinstance(content, dict) else "is not a JSON object"


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "is not installed" if error.name == module else f"needs {error.name}, which is not installed"
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the finding
        return f"cannot be imported ({type(error).__name__}: {str(error)[:200]})"
    return None


def _cgroup(name: str) -> str:
    """Return a value of this container's control group (version 2), or an empty text where there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""
