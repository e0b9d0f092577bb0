"""
A connection of psycopg with two ways of waiting.

All that psycopg's Connection does on the network is a generator, which yields
what to wait for: its socket to be readable, writable or both. It gives them to
its method wait(), which sends back what the socket has become.

Code in the bridge (see django.db.bridge) waits on the event loop, in which
case a cancellation of the task is raised in between. Everybody else blocks the
thread, as ever. Both may use a connection in turn, also in the middle of a
transaction.

psycopg holds the connection's lock while it waits. It's a lock for threads: if
two tasks on the same thread wanted it at once, both would hang, with the event
loop. So they have to take turns, and are refused if they don't.
"""

import asyncio
import logging
import os
import selectors
import threading
import weakref
from contextlib import suppress
from functools import partial
from time import monotonic

import psycopg
from psycopg import capabilities
from psycopg.pq import TransactionStatus
from psycopg.waiting import Ready, Wait

from django.db import bridge

logger = logging.getLogger("django.db.backends.postgresql")

# As plain numbers: combining members of an enumeration takes longer than the
# wait.
WAIT_R, WAIT_W = int(Wait.R), int(Wait.W)
READY_R, READY_W = int(Ready.R), int(Ready.W)

# Seconds after which a generator is asked again what it waits for. Its socket
# may have been closed in the meantime, which no event loop reports.
INTERVAL = 0.1

# Seconds that cancelling a query may take, and then its end.
CANCEL_TIMEOUT = 5

# Seconds after which code that never has to wait gives way to other tasks.
MAX_BUSY_TIME = 0.005


class Lock:
    """A lock for threads that doesn't block an event loop."""

    def __init__(self):
        self._lock = threading.Lock()

    def acquire(self, blocking=True, timeout=-1):
        if not blocking or bridge.current() is None:
            return self._lock.acquire(blocking, timeout)
        if not self._lock.acquire(blocking=False):
            raise psycopg.InterfaceError(
                "This connection is in use by another task or thread."
            )
        return True

    def release(self):
        self._lock.release()

    def locked(self):
        return self._lock.locked()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *exc_info):
        self.release()


class WaitingConnection(psycopg.Connection):
    """A connection that waits on the event loop if it's used in the bridge."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lock = Lock()
        # When it last gave way to other tasks, or was got from the pool.
        self.gave_way = 0
        self._alarm = None
        # Closed because the query couldn't be ended otherwise.
        self._stopped = False

    @classmethod
    def connect(cls, conninfo="", **kwargs):
        if bridge.current() is None:
            return super().connect(conninfo, **kwargs)
        if cls._is_host_unknown(conninfo, kwargs):
            # libpq would look up the name, and block.
            connect = partial(super().connect, conninfo, **kwargs)
            return bridge.await_(_call_in_thread(connect, cls.close))
        attempts = []
        connector = _connector(cls, attempts)
        try:
            return bridge.await_(connector.connect(conninfo, **kwargs))
        finally:
            # An exception's traceback refers to them, and they to the session
            # that the server may have begun.
            for attempt in attempts:
                attempt.close()

    @staticmethod
    def _is_host_unknown(conninfo, kwargs):
        """Return whether the host may be named by a service file."""
        params = psycopg.conninfo.conninfo_to_dict(
            conninfo,
            **{
                name: value
                for name, value in kwargs.items()
                if name in ("host", "hostaddr", "service")
            },
        )
        return bool(params.get("service") or os.environ.get("PGSERVICE")) and not (
            params.get("host") or params.get("hostaddr")
        )

    def wait(self, gen, interval=INTERVAL, **kwargs):
        waiting = bridge.current()
        if waiting is None:
            return super().wait(gen, interval, **kwargs)
        if waiting.closed:
            self._discard()
            raise psycopg.OperationalError(
                "The connection was closed, because the coroutine that used it was "
                "closed and can't wait for it any more."
            )
        if self._stopped:
            # psycopg's Copy expects nothing else when it's left.
            raise psycopg.errors.QueryCanceled(
                "The connection was closed, because its query was cancelled."
            )
        try:
            return self._wait_in_bridge(gen, **kwargs)
        except Exception:
            raise
        except BaseException:
            # Cancelled or interrupted.
            if waiting.closed:
                self._discard()
            elif self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                with bridge.shielded():
                    self._stop(gen)
            raise

    def _wait_in_bridge(self, gen, **kwargs):
        state = None
        # Raise if there is none, before psycopg looks at the state.
        self.pgconn.socket
        try:
            state = next(gen)
        except StopIteration as exc:
            result = exc.value
        if state is not None:
            result = bridge.await_(self._serve(gen, state, **kwargs))
        elif monotonic() - self.gave_way < MAX_BUSY_TIME:
            return result
        else:
            bridge.await_(asyncio.sleep(0))
        self.gave_way = monotonic()
        return result

    async def _serve(self, gen, state, timeout=None):
        """Give a generator what it waits for until it returns."""
        loop = asyncio.get_running_loop()
        if self._alarm is None or self._alarm.loop() is not loop:
            self._alarm = _Alarm(loop)
        fileno = self.pgconn.socket
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            remaining = None if deadline is None else max(0, deadline - monotonic())
            ready = await _wait_for_socket(loop, fileno, state, self._alarm, remaining)
            try:
                state = gen.send(ready)
            except StopIteration as exc:
                return exc.value
            if deadline is not None and monotonic() >= deadline:
                raise psycopg.errors._WaitTimeout("wait timeout expired")

    def _stop(self, gen):
        """
        Cancel the query that's running, and leave the connection clean or
        closed.
        """
        reason = "It's still running."
        try:
            self.cancel_safe(timeout=CANCEL_TIMEOUT)
            # It may have to send something before it can receive the result.
            state = gen.send(Ready.NONE)
            bridge.await_(asyncio.wait_for(self._serve(gen, state), CANCEL_TIMEOUT))
        except (StopIteration, psycopg.errors.QueryCanceled):
            pass
        except Exception as exc:
            reason = exc
        except BaseException:
            self.pgconn.finish()
            raise
        if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
            # As in the middle of a COPY.
            logger.info("A connection is closed after a cancellation: %r", reason)
            self._stopped = True
            self.pgconn.finish()

    def _discard(self):
        """Close the connection when nobody is there to wait for it."""
        if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
            thread = threading.Thread(target=self._cancel_and_finish, daemon=True)
            thread.start()
            if asyncio._get_running_loop() is None:
                thread.join(CANCEL_TIMEOUT)
        else:
            self.pgconn.finish()

    def _cancel_and_finish(self):
        with suppress(Exception):
            self.cancel_safe(timeout=CANCEL_TIMEOUT)
        self.pgconn.finish()

    def cancel_safe(self, *, timeout=30.0):
        if bridge.current() is None:
            super().cancel_safe(timeout=timeout)
        elif capabilities.has_cancel_safe():
            # All that it uses, both kinds of connections have.
            bridge.await_(psycopg.AsyncConnection.cancel_safe(self, timeout=timeout))
        else:
            bridge.await_(_call_in_thread(super().cancel))

    def is_quiet(self):
        """
        Return whether the server has sent nothing while nobody waited, as it
        does when it ends the session.
        """
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self.pgconn.socket, selectors.EVENT_READ)
                return not selector.select(0)
        except (OSError, psycopg.OperationalError):
            return False

    def set_autocommit(self, value):
        # It doesn't wait for the server. psycopg has a generator for it. If
        # that gave way to other tasks, a cancellation would come before Django
        # has noted the new value.
        if self.pgconn.transaction_status == TransactionStatus.IDLE:
            self._autocommit = bool(value)
        else:
            super().set_autocommit(value)

    # Once sent, it's done: whether it was is known only afterwards.

    def commit(self):
        with bridge.shielded():
            super().commit()

    def rollback(self):
        with bridge.shielded():
            super().rollback()


def _connector(connection_class, attempts):
    """
    Return a class whose awaitable connect() makes such connections. The
    generators that do so are added to a list.
    """

    class Connector(psycopg.AsyncConnection):
        @classmethod
        def _connect_gen(cls, *args, **kwargs):
            attempts.append(connection_class._connect_gen(*args, **kwargs))
            return attempts[-1]

    return Connector


class _Alarm:
    """
    What ends the waits for one connection on one event loop after a while,
    perhaps early: a timer serves all that begin before it's due.

    The event loop refers to it, so it doesn't refer to what leads to a task.
    """

    def __init__(self, loop):
        self.loop = weakref.ref(loop)
        self._future = None
        self._is_set = False

    def set(self, loop, future):
        self._future = weakref.ref(future)
        if not self._is_set:
            loop.call_later(INTERVAL, self._ring)
            self._is_set = True

    def _ring(self):
        self._is_set = False
        if (future := self._future()) is not None:
            _wake(future, 0)


def _wake(future, ready):
    if not future.done():
        future.set_result(ready)


async def _wait_for_socket(loop, fileno, state, alarm, timeout):
    """Return what a socket is ready for, which is nothing after a while."""
    future = loop.create_future()
    alarm.set(loop, future)
    timer = None
    try:
        try:
            if state & WAIT_R:
                loop.add_reader(fileno, _wake, future, READY_R)
            if state & WAIT_W:
                loop.add_writer(fileno, _wake, future, READY_W)
        except OSError as exc:
            raise psycopg.OperationalError("connection socket closed") from exc
        if timeout is not None:
            timer = loop.call_later(timeout, _wake, future, 0)
        return await future
    finally:
        if timer is not None:
            timer.cancel()
        if not loop.is_closed():
            if state & WAIT_R:
                loop.remove_reader(fileno)
            if state & WAIT_W:
                loop.remove_writer(fileno)


async def _call_in_thread(func, undo=lambda result: None):
    """
    Call a function in a thread of its own: the threads of an executor may be
    waiting for what this leads to. If the task is cancelled, undo it later.
    """
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def succeed(result):
        if future.done():
            undo(result)
        else:
            future.set_result(result)

    def fail(exc):
        if not future.done():
            future.set_exception(exc)

    def call():
        try:
            result = func()
        except Exception as exc:
            settle, arg = fail, exc
        else:
            settle, arg = succeed, result
        try:
            loop.call_soon_threadsafe(settle, arg)
        except RuntimeError:
            # The loop was closed.
            if settle is succeed:
                undo(arg)

    threading.Thread(target=call, daemon=True).start()
    try:
        return await future
    except BaseException:
        if future.done() and not future.cancelled() and not future.exception():
            # It has just arrived.
            undo(future.result())
        raise
