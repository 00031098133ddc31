"""Time limits hold when the clock on the wall jumps: nothing that waits, expires or is timed out looks at it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shared/mmprep", "frontend/mmprep_frontend", "worker/mmprep_worker")

#: What tells the time of day, by the last names of the expression.
WALL_CLOCKS = {
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "clock_gettime"),
    ("time", "clock_gettime_ns"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
}
#: Where the time of day is shown to somebody, or compared with one that comes from elsewhere: module and number of uses.
SHOWN = {
    "frontend/mmprep_frontend/http/door.py": 1,  # "created" of /v1/models
    "frontend/mmprep_frontend/media/cache_disk.py": 1,  # when a body was written, perhaps before a restart
    "frontend/mmprep_frontend/media/cache_desk.py": 1,  # how old what lies in the disk cache is
    "frontend/mmprep_frontend/media/exchange.py": 1,  # a Retry-After that is a date
    "frontend/mmprep_frontend/render/bounded_jinja.py": 1,  # strftime_now of chat templates
    "frontend/mmprep_frontend/tracing/spans.py": 1,  # collectors want the time of day
    "shared/mmprep/bridges/dynamo/chat.py": 1,  # "created" of an answer's chunks
    "shared/mmprep/chaos/__main__.py": 1,  # a seed
}


def wall_clock_uses(tree):
    """Return the lines that use a wall clock or import one by name."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value = node.value
            owner = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else ""
            if (owner, node.attr) in WALL_CLOCKS:
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            lines += [node.lineno for alias in node.names if ("time", alias.name) in WALL_CLOCKS]
    return lines


def test_no_module_looks_at_the_wall_clock_but_to_show_it():
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if lines := wall_clock_uses(ast.parse(path.read_text())):
                found[str(path.relative_to(ROOT))] = len(lines)
    assert found == SHOWN


@pytest.mark.parametrize(
    "code",
    [
        "import time\ndeadline = time.time() + 5",
        "from time import time_ns",
        "import datetime\ndatetime.datetime.now()",
        "from datetime import datetime\ndatetime.utcnow()",
        "import time\ntime.clock_gettime(time.CLOCK_REALTIME)",
    ],
)
def test_a_use_of_the_wall_clock_is_found(code):
    assert wall_clock_uses(ast.parse(code))


def test_monotonic_clocks_are_no_wall_clocks():
    assert not wall_clock_uses(ast.parse("import time\nloop.time() + time.monotonic() + time.perf_counter_ns()"))
