"""A run, or two beside each other, as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Final

from mmprep.loadtest.summary import SecondOfRun, Summary, compare
from mmprep.loadtest.targets import OK

_WIDTH, _HEIGHT = 720, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 34
#: Of the runs, in order; the second stroke of a run is dashed.
_COLOURS: Final = ("#0b6e99", "#c2571a")
_GREY: Final = "#8a8f98"
_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1d2129;"
    "background:#fff}h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}"
    "th,td{padding:.2rem .9rem .2rem 0;text-align:right;font-variant-numeric:tabular-nums}"
    "th:first-child,td:first-child{text-align:left}thead th{border-bottom:1px solid #c9cdd4}"
    "svg{display:block;width:100%;height:auto}text{font-size:11px;fill:#555b66}code{word-break:break-all}"
    ".key{display:inline-block;width:1.6rem;border-top:3px solid;vertical-align:middle;margin-right:.4rem}"
)

Points = Sequence[tuple[float, float]]


class Line:
    """One line of a plot.

    Parameters
    ----------
    name:
        For the legend.
    points:
        In order.
    """

    def __init__(self, name: str, points: Points, colour: str, *, dashed: bool = False) -> None:
        self.name = name
        self.points = points
        self.colour = colour
        self.dashed = dashed


def page(runs: Sequence[Summary]) -> str:
    """Return the page of one run, or of two of which the second is compared with the first."""
    title = " and ".join(run.name for run in runs)
    return "\n".join(
        (
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title><style>{_STYLE}</style></head>',
            f"<body><h1>{escape(title)}</h1>",
            *_figures(runs),
            "<h2>Requests a second</h2>",
            _plot(_throughput(runs), across="seconds from the start", up="a second"),
            "<h2>Latency in each second, from when a request was due</h2>",
            _plot(_latencies(runs), across="seconds from the start", up="ms", log_up=True),
            "<h2>Latency of all requests</h2>",
            _plot(_percentiles(runs), across="percentile", up="ms", log_up=True, ticks=_PERCENTILE_TICKS),
            *_outcomes(runs),
            *_settings(runs),
            "</body></html>",
            "",
        )
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def _figures(runs: Sequence[Summary]) -> Iterator[str]:
    second = runs[-1]
    yield "<table><thead><tr><th></th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    yield ("<th>ratio</th>" if len(runs) > 1 else "") + "</tr></thead><tbody>"
    for name, one, other, ratio in compare(runs[0], second):
        cells = [one, other, ratio] if len(runs) > 1 else [one]
        yield f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{_number(value)}</td>" for value in cells) + "</tr>"
    yield "</tbody></table>"


def _outcomes(runs: Sequence[Summary]) -> Iterator[str]:
    kinds = sorted({kind for run in runs for kind in run.outcomes}, key=lambda kind: (kind != OK, kind))
    yield "<h2>What became of the requests</h2><table><tbody>"
    for kind in kinds:
        counts = "".join(f"<td>{run.outcomes.get(kind, 0)}</td>" for run in runs)
        yield f"<tr><td>{escape(kind)}</td>{counts}</tr>"
    yield "</tbody></table>"


def _settings(runs: Sequence[Summary]) -> Iterator[str]:
    yield "<h2>Settings</h2><table><tbody>"
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        cells = "".join(f"<td><code>{escape(str(run.settings.get(name, '')))}</code></td>" for run in runs)
        yield f"<tr><td>{escape(name)}</td>{cells}</tr>"
    yield "</tbody></table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


# --- lines ------------------------------------------------------------------------------------------------------------

_PERCENTILE_TICKS: Final = tuple(
    (-math.log10(1 - percent / 100), f"{percent:g}") for percent in (0.0, 50.0, 90.0, 99.0, 99.9, 99.99)
)


def _throughput(runs: Sequence[Summary]) -> Iterator[Line]:
    for run, colour in zip(runs, _COLOURS, strict=False):
        yield Line(f"{run.name}: due", _over_time(run, lambda second: second.due), _GREY, dashed=colour != _COLOURS[0])
        yield Line(f"{run.name}: answered", _over_time(run, lambda second: second.answered), colour)
        if any(second.failed for second in run.seconds):
            yield Line(f"{run.name}: failed", _over_time(run, lambda second: second.failed), colour, dashed=True)


def _latencies(runs: Sequence[Summary]) -> Iterator[Line]:
    for run, colour in zip(runs, _COLOURS, strict=False):
        yield Line(f"{run.name}: median", _over_time(run, lambda second: second.p50_ms), colour)
        yield Line(f"{run.name}: p99", _over_time(run, lambda second: second.p99_ms), colour, dashed=True)


def _percentiles(runs: Sequence[Summary]) -> Iterator[Line]:
    """Give each latency at its percentile; across, each step is another nine."""
    for run, colour in zip(runs, _COLOURS, strict=False):
        seen, points = 0, []
        for lowest, count in run.latency.buckets:
            points.append((-math.log10(1 - seen / run.latency.count), lowest))
            seen += count
        yield Line(run.name, points, colour)


def _over_time(run: Summary, value: Callable[[SecondOfRun], float]) -> Points:
    return [(number + 0.5, float(value(second))) for number, second in enumerate(run.seconds)]


# --- drawing ----------------------------------------------------------------------------------------------------------


def _plot(
    lines: Iterator[Line],
    *,
    across: str,
    up: str,
    log_up: bool = False,
    ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """Return an SVG with a legend; zero is not drawn where the scale is logarithmic."""
    drawn = [Line(x.name, [p for p in x.points if p[1] > 0 or not log_up], x.colour, dashed=x.dashed) for x in lines]
    points = [point for line in drawn for point in line.points]
    if not points:
        return "<p>Nothing was answered.</p>"
    right = max(point[0] for point in points) or 1.0
    low, high = (min(p[1] for p in points), max(p[1] for p in points)) if log_up else (0.0, max(p[1] for p in points))
    rows = _decades(low, high) if log_up else _steps(high or 1.0)
    bottom, top = (math.log10(rows[0]), math.log10(rows[-1])) if log_up else (rows[0], rows[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        height = (math.log10(y) if log_up else y) - bottom
        return (
            round(_LEFT + x / right * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - height / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for row in rows:
        _, y = place(0, row)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="#e4e6ea"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{row:g}</text>')
    for value, label in ticks or [(step, f"{step:g}") for step in _steps(right)]:
        if value <= right:
            x, _ = place(value, rows[0])
            parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{label}</text>')
    for line in drawn:
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in line.points))
        dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.8"{dashes}/>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(across)}</text>')
    parts.append(f'<text x="4" y="{_TOP + 2}">{escape(up)}</text></svg>')
    keys = "".join(
        f'<span class="key" style="border-color:{line.colour};border-top-style:{"dashed" if line.dashed else "solid"}">'
        f"</span>{escape(line.name)} &#160; "
        for line in drawn
    )
    return "".join(parts) + f"<p>{keys}</p>"


def _steps(high: float) -> list[float]:
    """Return about five round values from 0 to one that is not below ``high``."""
    raw = high / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
    return [round(step * number, 12) for number in range(math.ceil(high / step - 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, … from below ``low`` to above ``high``; of many decades only the powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    values = [round(factor * 10.0**power, 9) for power in range(first, last + 1) for factor in factors]
    begin = max(value for value in values if value <= low * (1 + 1e-9))
    end = min(value for value in values if value >= high and value > begin)
    return [value for value in values if begin <= value <= end]
