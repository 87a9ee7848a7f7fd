"""A ServerApp or ClientApp process ends when the process that started it does.

Flower 1.41 looks whether its parent's process number is still in use. It is for as long as nobody
takes note of the parent's end, which under some first processes (of containers above all) is for
ever: the orphan would go on asking a SuperLink that is gone, and keep the run folder locked.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import cache

LOOK_SECONDS = 0.5


@cache
def end_with_parent() -> None:
    """Interrupt this process once it has another parent than Flower named when it started it."""
    if "--parent-pid" not in sys.argv[:-1]:
        return
    parent = int(sys.argv[sys.argv.index("--parent-pid") + 1])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        # Flower's own way out: its handlers tidy up. Sent to the process, it ends a wait of the
        # main thread; raised in this one, it would be seen after that wait only.
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
