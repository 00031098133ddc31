"""Torch for the tests of what needs it, in a test process that otherwise has none.

torch can be loaded once in a process, so it is hidden again after the tests of a file, and not unloaded. transformers is
asked before: it remembers its first answer, which must be the one that the other tests' references are made with.
"""

import importlib
import sys

import pytest
from transformers.utils import is_torch_available

_loaded = []


@pytest.fixture(scope="module", autouse=True, name="torch")
def torch_too():
    """Give torch, and let the tests of the file import it."""
    assert not is_torch_available()
    if _loaded:
        sys.modules["torch"] = _loaded[0]
    else:
        del sys.modules["torch"]
        _loaded.append(importlib.import_module("torch"))
    yield _loaded[0]
    sys.modules["torch"] = None
