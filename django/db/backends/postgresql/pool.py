"""
A pool of psycopg_pool that serves threads and event loops.

In the bridge (see django.db.bridge), getconn() waits on the event loop for its
place in the pool's one queue, in which threads wait, too. Neither a thread nor
an executor is used on the way. What takes longer is done by the pool's own
threads, as ever: connecting, resetting and growing.

The hand-over is psycopg's: a client that was offered a connection either has
accepted it, or refuses it because it doesn't wait any more. If it's cancelled
after it has accepted one, that goes back to the pool.
"""

import asyncio
import threading
from contextlib import suppress
from time import monotonic

from psycopg_pool import ConnectionPool, PoolTimeout

from django.db import bridge

from .waiting import WaitingConnection

# Seconds to wait before the next connection is tried, after one was broken.
FIRST_DELAY = 0.1
LONGEST_DELAY = 5


class LoopClient:
    """
    The place of a task in the queue. set() and fail() may be called anywhere.
    """

    def __init__(self):
        self.conn = None
        self._error = None
        self._waits = True
        self._lock = threading.Lock()
        self._served = bridge.Event()

    def set(self, conn):
        """Offer a connection. Return whether it was accepted."""
        return self._serve(conn=conn)

    def fail(self, error):
        """Return whether somebody is there to raise the exception."""
        return self._serve(error=error)

    def _serve(self, conn=None, error=None):
        with self._lock:
            if not self._waits or not self._served.set():
                return False
            self._waits = False
            self.conn = conn
            self._error = error
            return True

    def wait(self, timeout):
        """
        Return the connection. If an exception is raised instead, there may be
        a connection all the same.
        """
        try:
            self._served.wait(timeout)
        finally:
            with self._lock:
                timed_out, self._waits = self._waits, False
        if timed_out:
            raise PoolTimeout
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error
        return self.conn


class WaitingPool(ConnectionPool):
    def __init__(self, *args, connection_class=WaitingConnection, **kwargs):
        super().__init__(*args, connection_class=connection_class, **kwargs)

    def getconn(self, timeout=None):
        if bridge.current() is None:
            return super().getconn(timeout)
        if timeout is None:
            timeout = self.timeout
        self._stats[self._REQUESTS_NUM] += 1
        self._check_open_getconn()
        try:
            return self._get_working_connection(monotonic() + timeout)
        except PoolTimeout:
            raise PoolTimeout(
                f"couldn't get a connection after {timeout:.2f} sec"
            ) from None

    def _get_working_connection(self, deadline):
        delay = FIRST_DELAY
        while True:
            conn = self._get_any_connection(deadline - monotonic())
            try:
                self._check_connection(conn)
            except Exception:
                self._give_back(conn)
            except BaseException:
                self._give_back(conn)
                raise
            else:
                return conn
            if monotonic() + delay > deadline:
                raise PoolTimeout
            bridge.await_(asyncio.sleep(delay))
            delay = min(2 * delay, LONGEST_DELAY)

    def _get_any_connection(self, timeout):
        with self._lock:
            conn = self._get_ready_connection(timeout)
            if conn is None:
                client = LoopClient()
                self._waiting.append(client)
                self._stats[self._REQUESTS_QUEUED] += 1
                self._maybe_grow_pool()
        if conn is None:
            conn = self._wait_for_connection(client, timeout)
        # Not before, as it would make a reference cycle in the pool.
        conn._pool = self
        conn.gave_way = monotonic()
        return conn

    def _wait_for_connection(self, client, timeout):
        start = monotonic()
        try:
            return client.wait(timeout)
        except BaseException:
            self._stats[self._REQUESTS_ERRORS] += 1
            with self._lock, suppress(ValueError):
                # It would count for max_waiting.
                self._waiting.remove(client)
            if client.conn is not None:
                self._give_back(client.conn)
            raise
        finally:
            self._stats[self._REQUESTS_WAIT_MS] += int(1000 * (monotonic() - start))

    def _give_back(self, conn):
        """Return a connection that nobody has used."""
        with bridge.shielded():
            self._putconn(conn, from_getconn=True)

    def putconn(self, conn):
        # It may have to be rolled back, and is to reach the pool in any case.
        with bridge.shielded():
            super().putconn(conn)
