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

LOOK_SECONDS = 0.5


def end_with_parent() -> None:
    """Interrupt this process once it has another parent, where Flower started it as a child."""
    if "--parent-pid" not in sys.argv:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        signal.raise_signal(signal.SIGINT)  # Flower's own way out: its handlers tidy up

    threading.Thread(target=watch, daemon=True).start()
