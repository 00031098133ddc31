"""The whole service, simulated with faults: see :mod:`tests.simulation.run` for what must hold.

A seed that fails prints what happened in it, and the command that runs it again. Ten thousand seeds of each kind are a slow
test.
"""

import gc
import logging
from collections import Counter

import pytest
from tests.simulation.planted import BUGS
from tests.simulation.run import simulate

SEEDS, HARSH_SEEDS = 200, 50
SEEDS_AT_LENGTH = 10_000
#: Seeds in which every planted bug shows.
SEEDS_FOR_BUGS = 200
#: Where the search for a bug that few seeds show begins; the others begin with seed 0.
BEGIN = {
    "a killed lane's extent is free before it is gone": 40,
    "a backend takes up again what it has released": 150,
    "a lost connection is taken for a death": 142,
    "a backend ignores the tags of leases": 24,
    "what is given back ends although its backend has it": 71,
    "a job that is posted anew ends pins of before": 99,
    "a backend lets go of what it reads": 276,
    "what a dead lane left of a spill is published": 104,
}
LAST_LINES = 400


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """What the shells log about simulated faults is expected."""
    with caplog.at_level(logging.CRITICAL):
        yield
    gc.collect()


def check(seeds, **options):
    """Run seeds; return how much was read, granted and refused in all of them.

    ``full`` are the seeds in which items went to spills, others travelled inline, and others again were refused.
    """
    totals = Counter()
    for seed in seeds:
        outcome = simulate(seed, **options)
        if outcome.failure is not None:
            raise AssertionError(report(seed, **options)) from outcome.failure
        calls, beside = outcome.calls, outcome.beside
        totals += Counter(
            reads=outcome.reads,
            stale=outcome.stale,
            grants=outcome.grants,
            answered=calls["answered"],
            faults=outcome.faults.total(),
            full=bool(beside["spills"] and beside["fetched"] and (calls["Busy"] or calls["TooLarge"])),
            **beside,
            **outcome.jobs,
        )
        if seed % 20 == 0:
            gc.collect()
    return totals


def report(seed, **options):
    """Run a seed again with its log; return the log's last lines, and how to get all of it."""
    outcome = simulate(seed, log=True, **options)
    harsh = " --harsh" if options.get("harsh") else ""
    lines = "\n".join(outcome.lines[-LAST_LINES:])
    return f"{lines}\n\nseed {seed}: {outcome.failure}\nall of it: ./scripts/simulate --seed {seed}{harsh} --log"


def test_the_service_keeps_its_promises_whatever_happens_to_its_processes_and_connections():
    totals = check(range(SEEDS))
    assert totals["reads"] > 100 * SEEDS, "hardly anything was read"
    assert totals["answered"] > 30 * SEEDS, "hardly any call was answered"
    assert totals["grants"] > 10 * SEEDS, "hardly anything was computed"
    assert totals["faults"] > 5 * SEEDS, "hardly anything went wrong"
    assert totals["stale"] > 0, "no reader was ever told that something is gone"
    assert totals["full"] > SEEDS // 4, "there was room for nearly everything, or beside the ring for nearly nothing"
    assert totals["spills"] > 2 * SEEDS, "hardly anything went beside the ring"
    assert totals["fetched"] > 2 * SEEDS, "hardly anything travelled inline"
    assert totals["no memory"] > 0, "there was always memory for another segment"
    assert totals["jobs"] > 5 * SEEDS, "hardly any job was posted"
    assert totals["done"] > 3 * SEEDS, "hardly any job was done"
    assert totals["late"] > SEEDS // 4, "no backend was ever too late"


def test_no_byte_is_wrong_and_nothing_stays_even_where_control_messages_are_lost_doubled_and_reordered():
    check(range(HARSH_SEEDS), harsh=True)


@pytest.mark.slow
@pytest.mark.parametrize("harsh", [False, True], ids=["as it is", "harsh"])
@pytest.mark.parametrize("part", range(10))
def test_the_service_keeps_its_promises_in_ten_thousand_runs(part, harsh):
    tenth = SEEDS_AT_LENGTH // 10
    check(range(part * tenth, (part + 1) * tenth), harsh=harsh)


def test_a_seed_runs_the_same_each_time():
    first, second = (simulate(7, log=True) for _ in range(2))
    assert first.lines == second.lines
    assert len(first.lines) > 100


@pytest.mark.parametrize("bug", BUGS)
def test_the_simulation_finds(bug):
    begin = BEGIN.get(bug, 0)
    options = {"busy": 0.0, **BUGS[bug]}  # so that each event shows by itself
    found = (seed for seed in range(begin, begin + SEEDS_FOR_BUGS) if simulate(seed, **options).failure is not None)
    seed = next(found, None)
    assert seed is not None, f"no seed shows that {bug}"
    said = report(seed, **options)
    assert f"--seed {seed} --log" in said
    assert "!! " in said or "Hello" in said
