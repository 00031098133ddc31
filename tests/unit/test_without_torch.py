"""Processes that leave torch out, though it is installed."""

import importlib.util
import subprocess
import sys


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_who_leaves_torch_out_finds_none():
    installed = "import importlib.util as u; print(u.find_spec('torch') is not None)"
    left_out = f"from mmprep.without_torch import leave_torch_out; leave_torch_out(); {installed}"
    assert (run(installed), run(left_out)) == ("True\n", "False\n")


def test_a_torch_that_is_imported_already_stays():
    code = "import sys, types; sys.modules['torch'] = there = types.ModuleType('torch'); "
    code += "from mmprep.without_torch import leave_torch_out; leave_torch_out(); print(sys.modules['torch'] is there)"
    assert run(code) == "True\n"


def test_the_bridge_says_what_it_needs_where_there_is_no_torch():
    code = "from mmprep.without_torch import leave_torch_out; leave_torch_out()\n"
    code += "try:\n    import mmprep.bridges.torch\nexcept ModuleNotFoundError as error:\n    print(error, error.name)"
    assert run(code) == "this bridge needs torch: pip install mmprep[torch] torch\n"


def test_the_test_process_has_no_torch_either():
    assert importlib.util.find_spec("torch") is None
