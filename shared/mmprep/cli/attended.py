"""``python -m mmprep.cli.attended PID COMMAND …``: a command of ``mmprep`` that ends, as by SIGTERM, with its parent process.

For services that another command starts for itself: ``kill -9`` of that one must not leave them behind.
"""

from __future__ import annotations

import os
import signal
import sys

from mmprep.cli import main
from mmprep.parent import end_with_parent


def attended(*arguments: str) -> list[str]:
    """Return the command line by which this process, in its main thread, starts a command of ``mmprep`` for itself."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *arguments]


if __name__ == "__main__":
    end_with_parent(signal.SIGTERM)
    if os.getppid() != int(sys.argv.pop(1)):
        sys.exit(128 + signal.SIGTERM)
    main()
