"""Keeps torch out of the service's processes, also where it is installed beside them, as in an engine's environment.

transformers imports torch where it finds it: a frontend then starts with twice the CPU time and more than twice the
memory. It also takes other code then: Whisper's features come from torch and differ in their last bits. What a medium
becomes must not depend on what else is installed, since the key of a medium doesn't.

transformers has no setting for it. ``None`` in ``sys.modules`` is Python's own way to say that a module cannot be imported;
what looks for torch is told that it is not installed.
"""

from __future__ import annotations

import sys


def leave_torch_out() -> None:
    """Let this process find no torch from now on; to be called first, before transformers is imported.

    Where torch is imported already, nothing changes.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # typeshed doesn't know the documented None
