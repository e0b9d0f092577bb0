"""
Cursors for asynchronous code.

An AsyncCursor has no execution of its own: it calls the methods of a
CursorWrapper as asynchronous methods of the ORM call their synchronous
counterparts (see django.db.async_calls). So execute wrappers, query logging
and the translation of errors are those of the CursorWrapper.

Which connection it's opened on is decided where the work runs, when it's
entered: in thread mode, what connections[alias] is on the event loop's thread
isn't what it is in the thread that runs the queries. A connection that isn't
the one django.db.connections gives, as one around new_connection(), is used
itself.

An open cursor stays on that connection. In native mode, the connection is
leased until the cursor is closed. A cursor that was opened outside of a block
is refused inside, since what it executes wouldn't be a part of the block.
"""

import asyncio
import threading
from collections import deque
from contextlib import suppress
from functools import partial
from itertools import islice

from django.db import belonging, connections, native, sharing, threads
from django.db.abandoned import INTERVAL, log_failure
from django.db.async_calls import sync_to_async
from django.db.utils import InterfaceError

# How many rows are fetched at a time by "async for".
CHUNK_SIZE = 100


class AsyncCursor:
    """
    A cursor that's open inside of "async with".

    It's what connection.acursor() and connection.achunked_cursor() return.
    """

    # The CursorWrapper, once it was opened.
    _cursor = None

    def __init__(self, connection, method):
        alias = connection.alias
        self._connection = connection
        self._method = method
        # Whether it's opened on what connections[alias] is by then.
        self._follows = connection.serves_scope or (
            alias in connections and connections[alias] is connection
        )
        self._is_native = alias in connections.native_aliases
        # The driver's connection and the block that it was opened in.
        self._driver_connection = None
        self._block = None
        # What keeps the connection for the cursor in native mode.
        self._lease = None
        # Rows that "async for" has fetched and not given yet.
        self._rows = deque()
        # The AsyncCopy that's going on.
        self._copy = None

    def __getattr__(self, name):
        value = getattr(self._opened(), name)
        if callable(value):
            # It may have to wait for the database.
            return partial(self._call, name)
        return value

    async def __aenter__(self):
        if self._cursor is not None:
            raise InterfaceError("A cursor can be opened only once.")
        try:
            await sync_to_async(self._open, using=self._connection.alias)()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, exc_type, exc_value, traceback):
        await self.close()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._rows:
            self._rows.extend(await self._call("fetchmany", CHUNK_SIZE))
        if not self._rows:
            raise StopAsyncIteration
        return self._rows.popleft()

    async def execute(self, sql, params=None):
        self._rows.clear()
        return await self._call("execute", sql, params)

    async def executemany(self, sql, param_list):
        self._rows.clear()
        return await self._call("executemany", sql, param_list)

    async def callproc(self, procname, params=None, kparams=None):
        self._rows.clear()
        return await self._call("callproc", procname, params, kparams)

    async def nextset(self):
        self._rows.clear()
        return await self._call("nextset")

    async def fetchone(self):
        if self._rows:
            return self._rows.popleft()
        return await self._call("fetchone")

    async def fetchmany(self, size=None):
        if size is None:
            size = self.arraysize
        rows = [self._rows.popleft() for _ in range(min(size, len(self._rows)))]
        if len(rows) < size:
            rows += await self._call("fetchmany", size - len(rows))
        return rows

    async def fetchall(self):
        rows = [*self._rows]
        self._rows.clear()
        return rows + list(await self._call("fetchall"))

    def copy(self, statement, params=None, **kwargs):
        # Other drivers than psycopg have none.
        self._opened().copy
        return AsyncCopy(self, statement, params, kwargs)

    async def close(self):
        """Close the cursor, also if the task is cancelled meanwhile."""
        self._rows.clear()
        if asyncio._get_running_loop() is None:
            # A coroutine is destroyed whose loop was closed.
            self._end_lease()
        else:
            await self._run_to_the_end(self._close)

    # ##### What's called where the connection is used #####

    def _open(self):
        connection = self._connection
        if self._follows:
            connection = connections[connection.alias]
        cursor = getattr(connection, self._method)()
        self._block = belonging.joined(connection)
        if self._is_native:
            self._lease = native.extend_lease(connection)
        self._driver_connection = connection.connection
        self._cursor = cursor

    def _use(self, name, args, kwargs):
        self._check()
        if self._copy is not None:
            raise InterfaceError("The cursor can't be used until its COPY has ended.")
        cursor = self._cursor
        result = getattr(cursor, name)(*args, **kwargs)
        return self if result is cursor.cursor else result

    def _check(self):
        """
        Raise an exception if the current execution can't use the cursor, or
        nobody can any more.
        """
        connection = self._cursor.db
        is_inside = belonging.joined(connection) is not None
        if self._has_ended():
            raise InterfaceError("The cursor was closed with the block around it.")
        if not is_inside and self._block is not None and self._block.strict:
            raise belonging.foreign(connection)
        if not is_inside and self._follows and belonging.block_for(connection.alias):
            raise belonging.error(
                f"A cursor on the database '{connection.alias}' that was opened "
                "outside of a block can't be used inside. Open another one there."
            )
        if connection.turn is None:
            connection.validate_thread_sharing()
        if connection.connection is not self._driver_connection:
            raise InterfaceError(
                "The connection that this cursor was opened on has been closed."
            )

    def _has_ended(self):
        """Return whether the transaction that it was opened in has ended."""
        block = self._block
        return (
            block is not None
            and block.strict
            and all(
                outer.ended
                for outer in belonging.chain(block)
                if outer.connection is block.connection
            )
        )

    def _close(self):
        if self._cursor is None:
            return
        cursor, connection = self._cursor, self._cursor.db
        try:
            if (
                connection.connection is not self._driver_connection
                or self._has_ended()
            ):
                # Somebody else may have the driver's connection.
                return
            if connection.turn is None or not getattr(cursor.cursor, "name", None):
                cursor.__exit__(None, None, None)
            else:
                # The server is told.
                with sharing.taking_turn(connection, leaving=True):
                    cursor.__exit__(None, None, None)
        finally:
            self._end_lease()

    def _end_lease(self):
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.end()

    # ##### The way there #####

    def _opened(self):
        if self._cursor is None:
            raise InterfaceError('The cursor isn\'t open. Open it with "async with".')
        return self._cursor

    async def _call(self, name, *args, **kwargs):
        return await self._run(partial(self._use, name, args, kwargs))

    async def _run(self, func, alone=False):
        """
        Call a function where the connection is used: by nobody else meanwhile,
        if it's called `alone`.
        """
        connection = self._opened().db
        if self._is_native or not (alone or self._block is None):
            return await sync_to_async(func, using=connection.alias)()
        call = _Call(func, connection, alone)
        try:
            return await sync_to_async(call.run, using=connection.alias)()
        except asyncio.CancelledError:
            call.abandon()
            raise

    def _open_block(self):
        """Return the innermost block around it that hasn't ended, or None."""
        block = self._block
        while block is not None and block.ended:
            block = block.parent
        return block

    async def _run_to_the_end(self, func):
        """
        Call a function that ends something, as code inside the block that the
        cursor was opened in.
        """
        block = self._open_block()
        if self._is_native:
            await native.run(func, block, shielded=True)
            return
        _, cancelled = await threads.run_to_the_end(_executors(block), func, block)
        if cancelled is not None:
            raise cancelled


class AsyncCopy:
    """
    What psycopg calls an AsyncCopy, on the cursor of a connection whose Copy
    is synchronous.

    Until it ends, nothing else can be sent on the connection. So it holds the
    turn.
    """

    def __init__(self, cursor, statement, params, kwargs):
        self._cursor = cursor
        self._statement = statement
        self._params = params
        self._kwargs = kwargs
        # psycopg's Copy, and the context manager that gave it.
        self._copy = None
        self._manager = None
        self._give_turn = None

    async def __aenter__(self):
        try:
            await self._cursor._run(self._begin)
        except BaseException as exc:
            await self._finish(exc)
            raise
        return self

    async def __aexit__(self, exc_type, exc_value, traceback):
        try:
            if exc_value is None:
                await self._run(self._read_rest)
        except BaseException as exc:
            exc_value = exc
            raise
        finally:
            await self._finish(exc_value)

    def set_types(self, types):
        self._copy.set_types(types)

    async def read(self):
        return await self._run(self._copy.read)

    async def read_row(self):
        return await self._run(self._copy.read_row)

    async def write(self, buffer):
        await self._run(partial(self._copy.write, buffer))

    async def write_row(self, row):
        await self._run(partial(self._copy.write_row, row))

    async def __aiter__(self):
        while blocks := await self._run(self._read_chunk):
            for block in blocks:
                yield block

    async def rows(self):
        while rows := await self._run(self._read_rows):
            for row in rows:
                yield row

    # ##### What's called where the connection is used #####

    def _begin(self):
        cursor = self._cursor
        cursor._check()
        connection = cursor._cursor.db
        if cursor._block is not None:
            sharing.share(connection)
        elif not cursor._is_native:
            raise belonging.error(
                "copy() requires a block, because everything else that the thread "
                f"does with the database '{connection.alias}' would have to wait for "
                "its end, in that very thread. Use it inside aatomic() or "
                "new_connection()."
            )
        cursor._cursor._execute_with_wrappers(
            self._statement, self._params, many=False, executor=self._execute
        )

    def _execute(self, statement, params, many, context):
        cursor = self._cursor._cursor
        cursor.db.validate_no_broken_transaction()
        args = [] if params is None else [params]
        with cursor.db.wrap_database_errors:
            manager = cursor.copy(statement, *args, **self._kwargs)
            self._copy = manager.__enter__()
        self._manager = manager
        self._cursor._copy = self
        self._give_turn = sharing.hold_turn(cursor.db, self)

    def _use(self, func):
        self._cursor._check()
        if self._manager is None:
            raise InterfaceError("The COPY has ended.")
        with self._cursor._cursor.db.wrap_database_errors:
            return func()

    def _read_chunk(self):
        return list(islice(self._copy, CHUNK_SIZE))

    def _read_rows(self):
        return list(islice(self._copy.rows(), CHUNK_SIZE))

    def _read_rest(self):
        """
        Read what an early exit has left. To cancel it would break the
        transaction.
        """
        from psycopg.pq import ExecStatus, TransactionStatus

        if (
            self._copy.cursor.pgresult.status == ExecStatus.COPY_OUT
            and self._copy.connection.info.transaction_status
            == TransactionStatus.ACTIVE
        ):
            for block in self._copy:
                pass

    def _end(self, exc):
        manager, self._manager = self._manager, None
        if manager is None:
            return
        try:
            self._cursor._check()
            with self._cursor._cursor.db.wrap_database_errors:
                manager.__exit__(exc and type(exc), exc, exc and exc.__traceback__)
        finally:
            self._cursor._copy = None
            self._give_turn()

    # ##### The way there #####

    async def _finish(self, exc):
        if asyncio._get_running_loop() is not None:
            await self._cursor._run_to_the_end(partial(self._end, exc))
        elif self._manager is not None:
            # A coroutine is destroyed whose loop was closed.
            if self._cursor._is_native:
                self._cursor._driver_connection.close()
            else:
                # Whoever rolls back then needs the driver's lock.
                with suppress(Exception):
                    self._manager.__exit__(type(exc), exc, None)
            self._give_turn()

    async def _run(self, func):
        try:
            return await self._cursor._run(partial(self._use, func), alone=True)
        except asyncio.CancelledError:
            block = self._cursor._open_block()
            if block is not None:
                sharing.note_cancellation(block)
            raise


class _Call:
    """
    A call in a thread whose query is cancelled if nobody waits for it any
    more.

    For those that nobody can get in between: since they're `alone`, or since
    the connection is bound to the thread and there's no turn to wait for.
    Inside blocks, django.db.abandoned does this.
    """

    def __init__(self, func, connection, alone):
        self._func = func
        self._connection = connection
        self._alone = alone
        self._abandoned = False
        self._runs = False
        self._canceller = None
        self._ended = threading.Event()
        # Guards all of this.
        self._lock = threading.Lock()

    def run(self):
        with self._lock:
            if self._abandoned:
                raise belonging.call_abandoned(self._connection.alias)
            self._runs = True
        try:
            return self._func()
        finally:
            with self._lock:
                self._runs = False
            self._ended.set()
            if self._canceller is not None:
                # Its request mustn't reach the server during the next query.
                self._canceller.join()

    def abandon(self):
        with self._lock:
            self._abandoned = True
            if self._runs:
                self._canceller = threading.Thread(target=self._cancel, daemon=True)
                self._canceller.start()

    def _cancel(self):
        try:
            # The query may only be about to be sent.
            while not self._ended.is_set():
                if self._alone or self._connection.turn is None:
                    self._connection.cancel_query()
                self._ended.wait(INTERVAL)
        except Exception:
            log_failure()


def _executors(block):
    """Give those for what ends something inside `block`."""
    for block in belonging.chain(block):
        if block.thread is not None and not block.ended:
            yield block.thread
    yield from threads.thread_sensitive_executors()
