"""docs/invariants.md and docs/attacks.md say which test proves what; here they are held to that."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("invariants", "attacks")}
NAMED = sorted({pair for page in PAGES.values() for pair in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)})


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


@pytest.mark.parametrize("page", PAGES)
def test_every_line_of_the_table_names_a_test(page):
    rows = [line for line in PAGES[page].split("## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    assert all(re.search(r"`tests/[\w/]+\.py::\w+`", row) for row in rows)


def test_the_numbers_of_states_are_those_that_the_explorations_assert():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "exploration").glob("test_*.py"))
    asserted = set(re.findall(r"\d[\d_]{3,}", sources))
    for number in re.findall(r"\d+,\d{3}", PAGES["invariants"]):
        assert number.replace(",", "_") in asserted or number.replace(",", "") in asserted, number
