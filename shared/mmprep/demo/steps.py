"""What must be true at each step of the demonstration: plain data in, checks out.

Nothing here talks to a process, so that each check can be shown to fail on data that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mmprep.demo.page import Check
from mmprep.segment import SHM_DIRECTORY
from mmprep.sizes import format_duration, format_size

_QUERIES = 'mmprep_mm_cache_queries_total{modality="image"}'
_HITS = 'mmprep_mm_cache_hits_total{modality="image"}'
_LEASES = "mmprep_leases"
#: Parts of an address that say where an item lies; the others say what it is and who holds it.
_PLACE = ("segment", "epoch", "slot", "offset", "length", "generation")
#: Patches that become one token, 2 by 2, in the embedded model's family.
_MERGED = 4


def prompt(answer: Mapping[str, Any], pictures: int, image_token_id: int) -> list[Check]:
    """Check an answer's prompt: one range a picture, in order, apart, and all of them image tokens and no others."""
    ids = answer["token_ids"]
    ranges = [(entry["offset"], entry["offset"] + entry["length"]) for entry in _of(answer, "mm_placeholders")]
    marked = {position for start, end in ranges for position in range(start, end)}
    told = ", ".join(f"{start}-{end - 1}" for start, end in ranges)
    return [
        Check(len(ids) > 0, "prompt", f"{len(ids):,} token ids"),
        Check(
            len(ranges) == pictures and all(one[1] <= other[0] for one, other in pairwise(ranges)),
            "ranges",
            f"{told}: {len(ranges)} for {pictures} pictures, in their order and apart",
        ),
        Check(
            marked == {position for position, number in enumerate(ids) if number == image_token_id},
            "expansion",
            f"{len(marked):,} ids in the ranges: all that are the image token {image_token_id}, and nothing else",
        ),
    ]


def same_answer(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Check]:
    """Check that a second answer to the same chat has the same prompt and hashes, and names the same places."""
    same = first["token_ids"] == second["token_ids"] and all(
        _of(first, name) == _of(second, name) for name in ("mm_hashes", "mm_placeholders")
    )
    places = [[_place(address) for address in _of(answer, "mm_addresses")] for answer in (first, second)]
    leases = {address["lease"] for answer in (first, second) for address in _of(answer, "mm_addresses")}
    return [
        Check(
            same, "second answer", f"token ids, ranges and hashes {'as' if same else 'differ from those'} in the first"
        ),
        Check(
            places[0] == places[1],
            "same places",
            "its addresses name the same memory: nothing was computed or stored twice"
            if places[0] == places[1]
            else "its addresses name other memory",
        ),
        Check(
            len(leases) == 2 * len(places[0]),
            "leases",
            f"{len(leases)} leases in two answers with {len(places[0])} items each",
        ),
    ]


def tensors(
    names: Sequence[str], answer: Mapping[str, Any], items: Sequence[Mapping[str, Any]], processor: str
) -> list[Check]:
    """Check what the backend found at the addresses of ``answer``: equal to the reference, and as long as its range."""
    checks = []
    for name, item, entry in zip(names, items, _of(answer, "mm_placeholders"), strict=True):
        told = ", ".join(f"{field} {dtype} {tuple(shape)}" for field, (dtype, shape) in item["fields"].items())
        wrong = "; ".join(item["differences"])
        checks.append(Check(not wrong, name, wrong or f"{told}: equal to {processor}'s to the bit"))
        times, rows, columns = item["grid"]
        tokens = times * rows * columns // _MERGED
        if tokens != entry["length"]:
            checks.append(Check(False, name, f"{tokens} embeddings for a range of {entry['length']} tokens"))
    return checks


def mapping(maps: str, segment: str) -> Check:
    """Check ``/proc/<pid>/maps`` of the backend: ``segment``, by its POSIX name, is shared and not writable."""
    modes = [line.split()[1] for line in maps.splitlines() if line.endswith(f"{SHM_DIRECTORY}{segment}")]
    ok = bool(modes) and all(mode.startswith("r--s") for mode in modes)
    told = "shared and read-only" if ok else ", ".join(modes) or "not at all"
    return Check(ok, "mapping", f"{segment} is mapped {told}")


def counters(before: Mapping[str, float], after: Mapping[str, float], pictures: int) -> list[Check]:
    """Check the counters of ``/metrics`` over a first and a second request: every picture asked for twice, found once."""
    queries = int(after.get(_QUERIES, 0) - before.get(_QUERIES, 0))
    hits = int(after.get(_HITS, 0) - before.get(_HITS, 0))
    return [
        Check(
            (queries, hits) == (2 * pictures, pictures),
            "cache",
            f"{hits} hits in {queries} lookups ({pictures} in {2 * pictures} are right)",
        )
    ]


def leases(samples: Mapping[str, float]) -> int:
    """Return how many leases hold, by the service's metrics."""
    return int(samples.get(_LEASES, 0))


def describe(name: str, answer: Mapping[str, Any], number: int) -> list[tuple[str, str]]:
    """Return lines about one item of an answer: subject and text."""
    address = _of(answer, "mm_addresses")[number]
    entry = _of(answer, "mm_placeholders")[number]
    fields = ", ".join(f"{field['name']} {field['dtype']} {tuple(field['shape'])}" for field in address["fields"])
    place = f"slot {address['slot']}, generation {address['generation']}, offset {address['offset']:,}"
    return [
        (name, f"tokens {entry['offset']} to {entry['offset'] + entry['length'] - 1}"),
        ("  hash", _of(answer, "mm_hashes")[number]),
        ("  address", f"{place}, {format_size(address['length'])}, leased for {address['lease_seconds']} s"),
        ("  tensors", fields),
    ]


def times(first: float, second: float) -> list[tuple[str, str]]:
    """Return lines about the seconds that the two requests took."""
    return [
        ("first request", f"{format_duration(first)}, pictures decoded and processed"),
        ("second request", f"{format_duration(second)}, pictures from the cache"),
    ]


def _of(answer: Mapping[str, Any], name: str) -> list[Any]:
    features = answer.get("features") or {}
    found: list[Any] = (features.get(name) or {}).get("image", [])
    return found


def _place(address: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(address[part] for part in _PLACE)
