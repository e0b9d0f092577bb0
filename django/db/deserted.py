"""
What becomes of blocks whose event loop was closed.

Nobody is left to leave them then: the coroutines that would are destroyed, or
wait forever. So while there are blocks whose connections no thread has for
itself, one thread looks after their loops.
"""

import threading
import time
from contextlib import suppress

# Seconds between two looks at the event loops.
INTERVAL = 1


class LoopWatch:
    """A thread that runs as long as there are blocks to look after."""

    def __init__(self):
        self._blocks = {}
        self._is_running = False
        # Guards both.
        self._lock = threading.Lock()

    def add(self, block, loop, desert):
        """Have `desert()` called if the loop is closed before discard()."""
        with self._lock:
            self._blocks[block] = loop, desert
            if not self._is_running:
                thread = threading.Thread(
                    target=self._run, name="loops with open blocks", daemon=True
                )
                # If it can't be started, that's tried again with the next one.
                with suppress(RuntimeError):
                    thread.start()
                    self._is_running = True

    def discard(self, block):
        with self._lock:
            self._blocks.pop(block, None)

    def _run(self):
        while watched := self._next():
            # The innermost first.
            for block, (loop, desert) in reversed(watched):
                if loop.is_closed() and block in self._blocks:
                    with suppress(Exception):
                        desert()
                    self.discard(block)
            del watched, block, loop, desert

    def _next(self):
        """Return the open blocks after a while, if there are any."""
        time.sleep(INTERVAL)
        with self._lock:
            self._is_running = bool(self._blocks)
            return list(self._blocks.items())


watch = LoopWatch()
