"""State machines of the cores run twice: with thousands of steps in every run, and at length as a slow test."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine

STEPS_AT_LENGTH = 100


def at_length(machine: type[RuleBasedStateMachine]) -> type:
    """Return a slow test of ``machine`` with as many examples as the profile ``long`` has, and longer ones."""
    longer = type(f"{machine.__name__}AtLength", (machine,), {})
    longer.TestCase.settings = settings(
        settings.get_profile("long"), stateful_step_count=STEPS_AT_LENGTH, database=None, print_blob=True
    )
    return pytest.mark.slow(longer.TestCase)
