"""
What becomes of synchronous code whose caller was cancelled.

A thread can't be interrupted. When a task that awaits synchronous code is
cancelled, the code goes on in its thread, with nobody to take the result. Such
a call is abandoned: the statement that it runs is cancelled on the server, if
the backend can do that, and every other one is refused. If it ran any inside a
block, that block is marked for rollback; to leave it normally, since its body
swallowed the CancelledError or the TimeoutError, is an error, or its work
would be lost in silence.

A statement is cancelled by a thread, since that may need a connection of its
own. It goes on until the turn was given back, as the statement may only be
about to be sent. Who has the turn next waits for that thread, or the request
might reach the server when the next statement is running.
"""

import logging
import threading
import time
from contextlib import contextmanager

from django.db import belonging, sharing

logger = logging.getLogger("django.db.backends.base")

# Seconds between two requests to cancel a statement.
INTERVAL = 0.1


class Call:
    """One call of synchronous code by a task."""

    def __init__(self):
        self.abandoned = False
        # The blocks in which it ran statements, and the number of its turn on
        # their connections while it has it.
        self.turns = {}
        self._finished = False

    @contextmanager
    def running(self):
        """Note that the code runs, in the thread that it runs in."""
        outer = getattr(belonging.working, "call", None)
        belonging.working.call = self
        try:
            yield
        finally:
            belonging.working.call = outer
            self._finished = True

    def abandon(self):
        """Note that nobody waits for the code any more."""
        if self.abandoned or self._finished:
            return
        self.abandoned = True
        for block, count in self.turns.copy().items():
            block.cancelled = True
            if block.ended:
                continue
            sharing.mark_block_for_rollback(block, belonging.swallowed(block))
            cancel_statement(block.connection, count)


def cancel_statement(connection, count):
    """Cancel the statement that's run in a certain turn on the connection."""
    turn = connection.turn
    if turn is None or turn.cancelled is not None:
        return
    if turn.depth and turn.count == count:
        done = threading.Event()
        turn.cancelled = (count, done)
        thread = threading.Thread(
            target=_cancel, args=[connection, turn, count, done], daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            done.set()
            log_failure()


def _cancel(connection, turn, count, done):
    try:
        while turn.depth and turn.count == count:
            connection.cancel_query()
            time.sleep(INTERVAL)
    except Exception:
        log_failure()
    finally:
        done.set()


def log_failure():
    logger.warning("A query couldn't be cancelled.", exc_info=True)
