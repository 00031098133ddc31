"""Run seeds by hand: python -m tests.simulation --seeds 1000; see scripts/simulate."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter

from tests.simulation.run import simulate


def tell(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(prog="simulate", description="Simulate the service with faults, seed by seed.")
    parser.add_argument("--seeds", type=int, default=300, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--harsh", action="store_true", help="control messages are lost, doubled and reordered, too")
    parser.add_argument("--log", action="store_true", help="print all that happens, with --seed")
    parser.add_argument("--keep-going", action="store_true", help="go on after a seed that failed")
    options = parser.parse_args()
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    started, failed = time.process_time(), 0
    calls, faults, reads, beside, jobs = Counter(), Counter(), Counter(), Counter(), Counter()
    for number, seed in enumerate(seeds):
        outcome = simulate(seed, harsh=options.harsh, log=options.log and options.seed is not None)
        if number % 20 == 0:
            gc.collect()
        calls += outcome.calls
        faults += outcome.faults
        beside += outcome.beside
        jobs += outcome.jobs
        reads += Counter(right=outcome.reads, stale=outcome.stale, grants=outcome.grants, events=outcome.events)
        if outcome.lines is not None:
            tell("\n".join(outcome.lines))
        if outcome.failure is not None:
            failed += 1
            tell(f"seed {seed}: {outcome.failure}")
            if not options.keep_going:
                break
    seconds = time.process_time() - started
    tell(f"{number + 1} seeds, {failed} failed, {seconds:.1f} s of CPU; {dict(reads)}; {dict(beside)}; {dict(jobs)}")
    tell(f"calls: {dict(calls)}; faults: {dict(faults)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
