"""A run as plain data: what is written as JSON, read back, shown and compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import msgspec

from mmprep.errors import InvalidRequest
from mmprep.loadtest.histogram import Histogram
from mmprep.loadtest.run import Record
from mmprep.loadtest.targets import OK

FORMAT: Final = 1
_PERCENTS: Final = (50.0, 90.0, 95.0, 99.0, 99.9)


class Latency(msgspec.Struct, frozen=True):
    """A distribution, in milliseconds. ``buckets``: lower ends and counts, in order."""

    count: int
    mean_ms: float
    max_ms: float
    percentiles_ms: dict[str, float]
    buckets: list[tuple[float, int]]


class SecondOfRun(msgspec.Struct, frozen=True):
    """One second: requests due, answered and failed in it, and the latencies of the answered in milliseconds."""

    due: int
    answered: int
    failed: int
    p50_ms: float
    p99_ms: float


class Summary(msgspec.Struct, frozen=True):
    """A run.

    Attributes
    ----------
    format: of this form.
    name: of the run, for people.
    settings: what was asked, when and how.
    requests: that were due.
    outcomes: how often which; ``ok`` is an answer.
    elapsed_seconds: from the start to the last answer.
    throughput: answers a second.
    late_ms: by which a request was sent after it was due, at most.
    latency: from when a request was due to the end of its answer.
    service: from when it was sent.
    hit_rate: of the cache during the run; None where the server does not say.
    cpu_seconds: that the service used during the run; None where its processes are not known.
    cpu_ms_per_request: the same for one answer.
    load_cpu_seconds: that the load generator itself used from the first request to the last answer.
    seconds: of the run.
    """

    format: int
    name: str
    settings: dict[str, Any]
    requests: int
    outcomes: dict[str, int]
    elapsed_seconds: float
    throughput: float
    late_ms: float
    latency: Latency
    service: Latency
    hit_rate: float | None
    cpu_seconds: float | None
    cpu_ms_per_request: float | None
    load_cpu_seconds: float
    seconds: list[SecondOfRun]


def summarise(
    record: Record,
    *,
    name: str,
    settings: dict[str, Any],
    cache: tuple[float, float] | None,
    cpu: float | None,
) -> Summary:
    """Return a run as plain data.

    Parameters
    ----------
    cache:
        Lookups and hits during the run.
    cpu:
        Seconds of CPU time of the service.
    """
    answered = record.outcomes[OK]
    return Summary(
        format=FORMAT,
        name=name,
        settings=settings,
        requests=sum(second.due for second in record.seconds),
        outcomes=dict(sorted(record.outcomes.items())),
        elapsed_seconds=round(record.elapsed, 3),
        throughput=round(answered / record.elapsed, 2) if record.elapsed else 0.0,
        late_ms=_ms(record.late),
        latency=_latency(record.latency),
        service=_latency(record.service),
        hit_rate=round(cache[1] / cache[0], 4) if cache and cache[0] else None,
        cpu_seconds=None if cpu is None else round(cpu, 2),
        cpu_ms_per_request=round(1000 * cpu / answered, 3) if cpu is not None and answered else None,
        load_cpu_seconds=round(record.cpu, 3),
        seconds=[
            SecondOfRun(
                second.due,
                second.answered,
                second.failed,
                _ms(second.latency.percentile(50)),
                _ms(second.latency.percentile(99)),
            )
            for second in record.seconds
        ],
    )


def read_summary(path: Path) -> Summary:
    """Return the run that a file holds; raises InvalidRequest where it holds none."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Summary)
    except OSError as error:
        raise InvalidRequest(f"{path.name} cannot be read: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{path.name} is not the result of a load test: {error}") from None
    if found.format != FORMAT:
        raise InvalidRequest(f"{path.name} has form {found.format}; this version reads form {FORMAT}")
    return found


def table(run: Summary) -> str:
    """Return the run as lines for people."""
    latency, errors = run.latency, {kind: count for kind, count in run.outcomes.items() if kind != OK}
    shown = "  ".join(f"p{name} {value:g}" for name, value in latency.percentiles_ms.items())
    lines = [
        f"requests     {run.requests} due, {run.outcomes.get(OK, 0)} answered in {run.elapsed_seconds:g} s",
        f"throughput   {run.throughput:g} answers a second",
        f"latency, ms  {shown}  max {latency.max_ms:g}  (from when a request was due)",
    ]
    if run.late_ms >= 1:
        service = "  ".join(f"p{name} {value:g}" for name, value in run.service.percentiles_ms.items())
        lines += [
            f"service, ms  {service}  max {run.service.max_ms:g}  (from when it was sent)",
            f"lateness     a request was sent {run.late_ms:g} ms after it was due at most",
        ]
    if errors:
        lines.append("errors       " + ", ".join(f"{count} {kind}" for kind, count in errors.items()))
    if run.hit_rate is not None:
        lines.append(f"cache        {run.hit_rate:.1%} hits")
    if run.cpu_seconds is not None:
        each = "" if run.cpu_ms_per_request is None else f", {run.cpu_ms_per_request:g} ms a request"
        lines.append(f"CPU          {run.cpu_seconds:g} s of the service{each}")
    cores = run.load_cpu_seconds / run.elapsed_seconds if run.elapsed_seconds else 0.0
    lines.append(f"load         {run.load_cpu_seconds:g} s of CPU time of the load generator, {cores:.0%} of a core")
    return "\n".join(lines)


#: What two runs are compared by, and whether more of it is better.
COMPARED: Final[tuple[tuple[str, str, bool], ...]] = (
    ("throughput", "answers a second", True),
    ("latency.mean_ms", "latency, mean, ms", False),
    *((f"latency.percentiles_ms.{percent:g}", f"latency, p{percent:g}, ms", False) for percent in _PERCENTS),
    ("latency.max_ms", "latency, max, ms", False),
    ("hit_rate", "hit rate", True),
    ("cpu_ms_per_request", "CPU of the service a request, ms", False),
)


def compare(first: Summary, second: Summary) -> list[tuple[str, float | None, float | None, float | None]]:
    """Return for each figure its name, both values, and the second by the first; None where there is none."""
    rows = []
    for place, name, _ in COMPARED:
        one, other = (_figure(run, place) for run in (first, second))
        ratio = other / one if one and other is not None else None
        rows.append((name, one, other, ratio))
    return rows


def _figure(run: Summary, place: str) -> float | None:
    value: Any = run
    outer, _, inner = place.partition(".")
    value = getattr(value, outer)
    if inner.startswith("percentiles_ms."):
        value = value.percentiles_ms.get(inner.removeprefix("percentiles_ms."))
    elif inner:
        value = getattr(value, inner)
    return None if value is None else float(value)


def _latency(histogram: Histogram) -> Latency:
    return Latency(
        histogram.count,
        _ms(histogram.mean),
        _ms(histogram.largest),
        {f"{percent:g}": _ms(histogram.percentile(percent)) for percent in _PERCENTS},
        [(_ms(lowest), count) for lowest, count in histogram.rows()],
    )


def _ms(seconds: float) -> float:
    """Return milliseconds with three significant digits at least."""
    value = 1000 * seconds
    return round(value, max(0, 3 - math.floor(math.log10(value)))) if value > 0 else 0.0
