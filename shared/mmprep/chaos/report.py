"""The report of a chaos run as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def tables(result: dict[str, Any]) -> str:
    """Return the whole result as text."""
    load = result["machine"]["load_average"][0]
    machine = f"{result['machine']['cores']} cores, Python {result['machine']['python']}, load before the run {load}"
    sections = [
        f"{machine}; seed {result['seed']}, {result['minutes']:g} minutes, a fault every {result['every']:g} s",
        _table("chaos", ["what", "", "must be"], _rows(result)),
        _table("calls", ["kind", "outcome", "count"], _flat(result["calls_by_kind"])),
        _table("faults", ["kind", "count"], result["faults_by_kind"].items()),
        _table("reads of held items", ["way", "reads"], result["reads_by_way"].items()),
        _table("errors that say: try again", ["of", "type", "count"], _flat(result["retryable_errors"])),
    ]
    if result["other_errors"]:
        sections.append(_table("other errors", ["of", "type", "count"], _flat(result["other_errors"])))
    if result["provoked_errors"]:
        sections.append(_table("… of which provoked by", ["", "count"], result["provoked_errors"].items()))
    lists = [title for title in ("unexpected", "wrong", "left_behind", "notes") if result[title]]
    sections += ["\n".join([f"== {title.replace('_', ' ')}", *result[title]]) for title in lists]
    sections.append("passed" if result["passed"] else "FAILED")
    return "\n\n".join(sections)


def _rows(result: dict[str, Any]) -> list[Sequence[Any]]:
    kills = result["after_writer_kill"]
    rates = {name: _percent(rate) for name, rate in result["hit_rate"].items()}
    rows: list[Sequence[Any]] = [
        ("wrong bytes", result["wrong_bytes"], 0),
        ("leaks", result["leaks"], 0),
        ("unanswered calls", result["unanswered"], 0),
        ("unexpected errors", result["unexpected_errors"], 0),
        ("calls", result["calls"], ""),
        ("… answered right", result["answered_right"], ""),
        ("faults", result["faults"], ""),
        ("retries", result["retries"], ""),
        ("reads of held items", result["reads"], ""),
        ("stale reads refused", result["stale_reads_refused"], ""),
        ("leases lost", result["leases_lost"], ""),
        ("longest gap between answers, s", "{seconds} (after {began})".format(**result["longest_gap"]), ""),
    ]
    for name, what in (("any_answer", "any answer"), ("answer_that_needs_a_lane", "a computed one")):
        kill = kills[name]
        took = f"{kill['median_seconds']} (longest {kill['max_seconds']}, {kill['kills']} kills)"
        rows.append((f"from a writer's kill to {what}, median s", took, ""))
    before_and_after = f"{rates['before']} and {rates['after']} (all the time {rates['all']})"
    rows.append(("hit rate before and after a writer's kill", before_and_after, ""))
    rows += [(what, value, "") for what, value in result["circumstances"].items()]
    return rows


def _percent(rate: dict[str, Any]) -> str:
    return "-" if rate["rate"] is None else f"{rate['rate']:.1%} of {rate['lookups']}"


def _flat(nested: dict[str, dict[str, int]]) -> Iterable[Sequence[Any]]:
    return [(first, second, count) for first, counts in nested.items() for second, count in counts.items()]


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"== {title}", *text])
