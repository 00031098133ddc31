"""The options of ``mmprep bench``. Nothing that the extra ``server`` installs is imported here: help needs none of it."""

from __future__ import annotations

import argparse
from typing import Final

#: The environment variable that a server's API key is read from.
KEY: Final = "MMPREP_BENCH_API_KEY"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; ends the process where they are wrong, or help is asked for."""
    return _parser().parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="mmprep bench",
        description="Load a running server with generated chats and say how long its answers took. Pictures are "
        "generated; nothing is downloaded.",
    )
    made.add_argument(
        "target",
        nargs="?",
        help="http://host:port of any server with the same paths, or ipc://RUNTIME_DIR for the native client; default: "
        "the native client, in --runtime-dir or the default one",
    )
    what = made.add_argument_group("what is asked")
    what.add_argument(
        "--workload",
        default="zipf",
        choices=("distinct", "zipf", "multi-turn", "text", "mixed", "trace"),
        help="new pictures; some pictures wanted more often than others (default); conversations; no pictures; new "
        "pictures of many sizes; a recorded trace",
    )
    what.add_argument("--trace", help="JSON lines of a trace: timestamp, prompt_length, media with id and size")
    what.add_argument("--speed", type=_above_zero, default=1.0, help="how much faster than recorded a trace goes")
    what.add_argument("--size", default="640x480", help="of pictures: 640x480, 1280x720, 1920x1080 or 4032x3024")
    what.add_argument("--pictures", type=_natural, default=1, help="of a request, or of a conversation's first turn")
    what.add_argument("--words", type=_natural, default=20, help="of a request, or of a turn")
    what.add_argument("--population", type=_natural, default=100, help="pictures of the Zipf workload")
    what.add_argument("--exponent", type=_not_negative, default=1.0, help="of its law")
    what.add_argument("--turns", type=_natural, default=5, help="of a conversation")
    what.add_argument("--conversations", type=_natural, default=16, help="that go on side by side")
    what.add_argument("--seed", type=int, help="of all that is drawn; default: another one each time")
    when = made.add_argument_group("when")
    when.add_argument(
        "--rate", type=_above_zero, help="requests a second that are due, whatever comes of them (open loop)"
    )
    when.add_argument("--arrivals", default="poisson", choices=("poisson", "constant", "ramp"))
    when.add_argument("--to-rate", type=_above_zero, help="of a ramp: the rate at its end")
    when.add_argument("--users", type=_natural, help="who each ask again after an answer (closed loop; default: 8)")
    when.add_argument(
        "--think", type=_not_negative, default=0.0, help="seconds from an answer to a user's next request"
    )
    when.add_argument("--seconds", type=_above_zero, default=30.0, help="for which requests are sent")
    when.add_argument("--warm-up", type=_not_negative, default=2.0, help="seconds before that are not measured")
    when.add_argument("--timeout", type=_above_zero, default=60.0, help="seconds after which a request is given up")
    when.add_argument("--max-in-flight", type=_natural, default=512, help="of an open loop; beyond, requests are late")
    how = made.add_argument_group("how")
    how.add_argument(
        "--payload",
        choices=("shm", "tensors", "none"),
        help="what is asked for; default: tensors over HTTP, shm of the native client",
    )
    how.add_argument(
        "--queued",
        action="store_true",
        help="post the requests to a queue of the test's own, and pull them from it: an answer is a job that is here, "
        "mapped and acknowledged; by the native client",
    )
    how.add_argument("--path", default="/v1/chat/completions/render", help="of an HTTP server")
    how.add_argument("--msgpack", action="store_true", help="ask an HTTP server for MessagePack")
    how.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="another field of every request, as model='\"name\"'; may be repeated",
    )
    made.add_argument(
        "--pid", type=_natural, action="append", default=[], help="process whose CPU time is the service's"
    )
    made.add_argument(
        "--runtime-dir",
        help="of the service: without a target that of the native client; with a URL of the service whose CPU time is told",
    )
    made.add_argument("--name", help="of the run, for reports")
    made.add_argument("--output", help="file for the result as JSON")
    made.add_argument("--html", help="file for the report: one page with plots that needs nothing else")
    made.add_argument("--compare", nargs=2, metavar="FILE", help="compare two results instead of measuring")
    made.epilog = f"A server's API key is read from the environment variable {KEY}."
    return made


def _natural(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must not be negative")
    return value
