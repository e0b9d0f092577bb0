"""
What transactions leave to the next one of their scope.

An ASGI request is a scope; outside of requests, a thread with the event loops
that run in it, or for it in async_to_sync(), is one. An outermost aatomic()
has a connection and a thread of its own. At its end they're kept, one of each
for an alias, so that blocks which follow each other don't open a connection
each. A connection goes back to its pool instead, and is got from there again.

Nothing is in use while it's kept: the thread waits, and the session has a
connection that no block has had, since the last one's is retired (see
django.db.sharing). But what a block did to the session itself with SET,
temporary tables or advisory locks stays, as it does on a thread's connection.

A scope closes what it has kept when it ends. That of a thread also shows its
connections in connections.all() while the thread runs no event loop. So it's
there, as for the thread's own, that close_old_connections() and
TransactionTestCase close them.
"""

import asyncio
import logging
import os
import threading
import time
import weakref
from concurrent.futures import Future
from contextvars import ContextVar

from asgiref.sync import AsyncToSync

logger = logging.getLogger("django.db.backends.base")

# Seconds after which a connection may have been closed by the server, so that
# it's checked without CONN_HEALTH_CHECKS, too.
CHECK_AFTER = 10

# The scope of the request that is being handled.
request = ContextVar("django.db.scopes", default=None)

_threads = weakref.WeakKeyDictionary()

# What a forked process has inherited and mustn't touch: the sessions are those
# of its parent, and no thread has come along.
_inherited = []


class Lease:
    """
    A connection and a thread for one transaction after the other.

    `worker` is None for the first one, which starts it.
    """

    def __init__(self, connection, worker=None):
        self.connection = connection
        self.worker = worker
        # How many operations of native mode use it (see django.db.native).
        self.users = 0
        self._settings = None
        self._idle_since = None

    def rest(self):
        """Note how it is while nobody uses it."""
        self._settings = self.connection.settings_dict.copy()
        self._idle_since = time.monotonic()

    def fits(self, settings):
        """Return whether the settings are those it was opened with."""
        return settings.get(self.connection.alias) == self._settings

    def prepare(self):
        """
        Bind the connection to no thread any more (see Scope.show()). Have it
        checked before it's used, if that's due.
        """
        connection = self.connection
        connection._thread_ident = None
        connection.health_check_done = False
        connection.health_check_enabled = (
            connection.settings_dict["CONN_HEALTH_CHECKS"]
            or time.monotonic() - self._idle_since > CHECK_AFTER
        )

    def call(self, func, ends=False):
        """
        Call a function in the thread, which then waits for the next one or
        `ends`. Return a Future.
        """
        future = Future()

        def call():
            self.connection._thread_ident = threading.get_ident()
            try:
                func()
            except Exception as exc:
                log_failure(self.connection, exc)
            finally:
                # The end of a request waits for it.
                future.set_result(None)
            return not ends

        self.worker.give(call)
        return future

    def close(self):
        """Close the connection, and end the thread. Return a Future."""
        if self.worker is not None:
            return self.call(self.connection.close, ends=True)
        # It has none, as its tasks use it on their event loop.
        connection, future = self.connection, Future()
        driver_connection, connection.connection = connection.connection, None
        if driver_connection is not None:
            # That doesn't wait for the server.
            driver_connection.close()
        future.set_result(None)
        return future


class Scope:
    def __init__(self):
        self._leases = {}
        # The connections that tasks of native mode share, in use or not.
        self.shared = {}
        self.is_open = True
        self.lock = threading.RLock()

    def take(self, alias, settings):
        """Return what was kept for `alias`, or None."""
        with self.lock:
            lease = self._leases.pop(alias, None)
        if lease is not None and not lease.fits(settings):
            lease.close()
            return None
        if lease is not None:
            lease.prepare()
        return lease

    def keep(self, lease):
        """
        Keep a connection and thread that aren't in use any more, unless there
        are such already. Return whether that's so.
        """
        with self.lock:
            if not self.is_open or lease.connection.alias in self._leases:
                return False
            lease.rest()
            self._leases[lease.connection.alias] = lease
            return True

    def take_all(self):
        """Return all that was kept, for whoever keeps or closes it."""
        with self.lock:
            leases, self._leases = self._leases, {}
            return list(leases.values())

    def show(self):
        """
        Return the connections that the current thread may close: the open
        ones, and those of native mode, which keep what's set on them.
        """
        with self.lock:
            shown = [
                lease.connection
                for lease in self._leases.values()
                if lease.connection.connection is not None
            ]
            shown += [
                lease.connection for lease in self.shared.values() if not lease.users
            ]
            for connection in shown:
                connection._thread_ident = threading.get_ident()
            return shown

    def close(self):
        """Close what was kept, in its threads. Return their Futures."""
        with self.lock:
            self.is_open = False
            # Operations that go on after the end close theirs.
            shared = [lease for lease in self.shared.values() if not lease.users]
            leases = [*self._leases.values(), *shared]
            self._leases, self.shared = {}, {}
        return [lease.close() for lease in leases]

    __del__ = close


def close_quietly(connections):
    """Close each of them, whatever becomes of the others."""
    for connection in connections:
        try:
            connection.close()
        except Exception as exc:
            log_failure(connection, exc)


def log_failure(connection, exc):
    logger.error(
        "Error closing a connection to the database '%s'.",
        connection.alias,
        exc_info=exc,
    )


def close_those_of_the_thread():
    """Close the connections that the current thread has for itself."""
    # It imports this module.
    from django.db import connections

    close_quietly(connections.all(initialized_only=True))


def current():
    """Return the scope of the current task."""
    if (scope := request.get()) is not None:
        return scope
    thread = threading.current_thread()
    # The thread that waits for the event loop, if it's in async_to_sync().
    executor = AsyncToSync.loop_thread_executors.get(asyncio.get_running_loop())
    thread = getattr(executor, "_work_thread", thread)
    # Without a lock, which a fork could leave locked.
    return _threads.get(thread) or _threads.setdefault(thread, Scope())


def idle_connections():
    """
    Return the connections that the scope of the current thread keeps, if it
    runs no event loop that could take them in the meantime.
    """
    scope = _threads.get(threading.current_thread())
    if (
        scope is None
        or asyncio._get_running_loop() is not None
        or getattr(AsyncToSync.executors, "current", None) is not None
    ):
        return []
    return scope.show()


def _disown():
    _inherited.extend(_threads.values())
    _threads.clear()
    if (scope := request.get()) is not None:
        _inherited.append(scope)
        request.set(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)
