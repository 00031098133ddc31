"""docs/invariants.md says which test proves what; here it is held to that."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


def defined(path):
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_the_test_exists(path, name):
    assert name in defined(path)


def test_every_line_of_the_table_names_a_test():
    lines = [line for line in PAGE.split("## ")[0].splitlines() if line.startswith("| ") and "proved by" not in line]
    assert len(lines) > 10
    assert all(re.search(r"`tests/[\w/]+\.py::\w+`", line) for line in lines)


def test_the_numbers_of_states_are_those_that_the_explorations_assert():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "exploration").glob("test_*.py"))
    asserted = set(re.findall(r"\d[\d_]{3,}", sources))
    for number in re.findall(r"\d+,\d{3}", PAGE):
        assert number.replace(",", "_") in asserted or number.replace(",", "") in asserted, number
