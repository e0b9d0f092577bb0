"""
Captures of queries that several connections run.

CaptureQueriesContext captures what one connection logs. But code inside of it
may use others to the same database: a transaction of aatomic() has one of its
own, and what asynchronous code runs outside of blocks uses that of a thread.
So whoever is inside of a capture also adds the queries to the captured log.
"""

import _thread
import asyncio
from contextlib import contextmanager
from contextvars import ContextVar

from asgiref.local import _Storage

from django.db import belonging

# The captures that the execution is inside of, innermost last, as the data of
# an asgiref.local._Storage: asgiref sets its thread_id anew wherever it brings
# a context to another thread on purpose.
_inherited = ContextVar("django.db.captures", default=None)


class Capture:
    """A capture from the log of a connection, until end() is called."""

    def __init__(self, connection):
        self.alias = connection.alias
        self.log = connection.queries_log
        self.thread_ident = _thread.get_ident()
        self.in_async = asyncio._get_running_loop() is not None
        # Contexts may hold it for longer than it lasts.
        self.active = True
        _set([*_get(), self])

    def end(self):
        self.active = False
        _set([capture for capture in _get() if capture.active])

    def covers(self, connection, home):
        """
        Return whether queries that the current thread runs on `connection`,
        which isn't the captured one, are captured. `home` is the thread that
        asgiref brought the context to.
        """
        return (
            self.active
            and self.alias == connection.alias
            and self.log is not connection.queries_log
            # Synchronous code has never captured what threads run that it
            # gave a copy of its context.
            and (
                self.in_async
                or belonging.is_moved(home, _thread.get_ident(), self.thread_ident)
            )
        )


def _get():
    storage = _inherited.get()
    return [] if storage is None else storage.data


def _set(captures):
    storage = _inherited.get()
    home = _thread.get_ident() if storage is None else storage.thread_id
    _inherited.set(_Storage(home, captures) if captures else None)


def is_captured(connection):
    """Return whether logs() has any."""
    return _inherited.get() is not None and bool(logs(connection))


def logs(connection):
    """
    Return the captured logs of other connections that a query on `connection`
    is to be added to.
    """
    storage = _inherited.get()
    if storage is None:
        return ()
    # Captures of one log may be nested.
    return {
        id(capture.log): capture.log
        for capture in storage.data
        if capture.covers(connection, storage.thread_id)
    }.values()


@contextmanager
def paused():
    """Add nothing to the logs of other connections."""
    storage = _inherited.get()
    _inherited.set(None)
    try:
        yield
    finally:
        _inherited.set(storage)
