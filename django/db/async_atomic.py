"""
The asynchronous counterpart of transaction.Atomic.

AsyncAtomic has no state machine of its own: it enters and leaves an Atomic in
a thread. Entering the outermost block of a task makes a connection and a
thread (see django.db.threads) for the transaction; leaving it disposes of
both, on every path. A nested block is entered and left wherever the
thread-sensitive synchronous code around it runs.

Entering and leaving run to their end once they have been given to a thread,
even if the task is cancelled meanwhile: otherwise the thread would go on with
nobody there to end what it began. If entering was cancelled, it's undone.
"""

import asyncio
import logging
from _thread import get_ident
from contextlib import suppress
from contextvars import copy_context
from copy import copy
from functools import partial, wraps
from inspect import iscoroutinefunction

from asgiref.sync import AsyncToSync

from django.db import belonging, connections, threads
from django.db.async_calls import sync_to_async
from django.db.utils import DEFAULT_DB_ALIAS, Error

logger = logging.getLogger("django.db.backends.base")


class AsyncAtomic:
    """
    Guarantee the atomic execution of a given block of asynchronous code.

    An instance can be used as an asynchronous context manager, any number of
    times and by several tasks, or as a decorator for coroutine functions.

    This is a private API.
    """

    def __init__(self, atomic):
        self._atomic = atomic
        # The entries that haven't been left, the last one at the end.
        self._entries = belonging.Entries()

    def __call__(self, func):
        if not iscoroutinefunction(func):
            raise TypeError(
                "aatomic() can only decorate coroutine functions. Use atomic() for "
                "%r." % getattr(func, "__qualname__", func)
            )

        @wraps(func)
        async def inner(*args, **kwargs):
            async with AsyncAtomic(self._atomic):
                return await func(*args, **kwargs)

        return inner

    async def __aenter__(self):
        # Each entry has an Atomic of its own, which tells its block from those
        # that the same instance entered elsewhere.
        atomic = copy(self._atomic)
        alias = atomic.using or DEFAULT_DB_ALIAS
        outer = belonging.open_block(alias)
        if outer is None:
            entry = _Transaction(atomic, alias)
        else:
            entry = _Nested(atomic, outer)
        await entry.enter()
        self._entries.push(entry)

    async def __aexit__(self, exc_type, exc_value, traceback):
        await self._entries.pop().leave(exc_type, exc_value, traceback)


class _Entry:
    """A block that an AsyncAtomic has entered."""

    def __init__(self, atomic, alias, connection):
        self.atomic = atomic
        self.executor = None
        self.hooks = []
        self.block = belonging.Block(
            alias,
            connection,
            atomic,
            task=asyncio.current_task(),
            title=belonging.execution_name(),
        )

    async def leave(self, exc_type, exc_value, traceback):
        if self.block.ended:
            belonging.restore(self.block)
            if exc_type is None:
                raise belonging.rolled_back(self.block)
            return
        if exc_type is None:
            try:
                await self._wait_for_nested()
            except BaseException as exc:
                await self._exit(type(exc), exc, exc.__traceback__)
                raise
        await self._exit(exc_type, exc_value, traceback)

    async def _wait_for_nested(self):
        """Wait for blocks of tasks that were started inside to be left."""
        connection = self.block.connection

        def ready():
            return self.block.ended or connection.blocks[-1] is self.block

        if not await connection.turn.comes(ready, belonging.TURN_TIMEOUT):
            raise belonging.waited_in_vain(connection)

    async def _exit(self, *exc_info):
        try:
            await self._run(partial(self._exit_atomic, *exc_info))
        finally:
            if self.block.ended:
                belonging.restore(self.block)
                self._uninstall()
                # Also if the task was cancelled during the COMMIT.
                await self._run_hooks()

    def _uninstall(self):
        pass

    def _exit_atomic(self, *exc_info):
        self.atomic.__exit__(*exc_info)
        if self.block.hooks_due:
            connection = self.block.connection
            self.hooks, connection.run_on_commit = connection.run_on_commit, []

    async def _enter(self, func):
        """
        Call `func`, which may enter the block. If the task is cancelled
        meanwhile, leave the block again.
        """
        try:
            return await self._run(func)
        except asyncio.CancelledError as exc:
            if self.block.entered and not self.block.ended:
                undo = partial(self._exit_atomic, type(exc), exc, None)
                await run_to_the_end(self.executor, undo, self.block)
            raise

    async def _run(self, func):
        result, cancelled = await run_to_the_end(self.executor, func, self.block)
        if cancelled is not None:
            raise cancelled
        return result

    async def _run_hooks(self):
        """Call what on_commit() registered, outside of the transaction."""
        for _, func, robust in self.hooks:
            await run_hook(
                func,
                robust,
                "Error calling %s in on_commit() during transaction (%s).",
            )


class _Nested(_Entry):
    """A block inside another one, so a savepoint as a rule."""

    def __init__(self, atomic, outer):
        super().__init__(atomic, outer.alias, outer.connection)

    async def enter(self):
        self.executor = threads.thread_sensitive_executor()
        enter_in_turn = belonging.in_turn(self._enter_atomic)
        deadline = asyncio.get_running_loop().time() + belonging.TURN_TIMEOUT
        while True:
            if not await belonging.its_turn(deadline):
                raise belonging.waited_in_vain(self.block.connection)
            entered, _ = await self._enter(enter_in_turn)
            if entered:
                break
        belonging.begin(self.block)

    def _enter_atomic(self):
        belonging.share(self.block.connection)
        self.atomic.__enter__()


class _Transaction(_Entry):
    """An outermost block, with a connection and a thread of its own."""

    def __init__(self, atomic, alias):
        super().__init__(atomic, alias, None)

    async def enter(self):
        block = self.block
        connection = connections.create_connection(block.alias)
        if _is_shared(connection):
            connection = await self._borrow()
        else:
            belonging.share(connection)
            connection._thread_ident = None
        block.connection = connection
        block.thread = self.executor = threads.TransactionThread(
            f"transaction of {block}", connections.close_all
        )
        try:
            await self._enter(self._enter_atomic)
        except BaseException:
            if not block.ended:
                await run_to_the_end(self.executor, self._dispose, block)
            raise
        belonging.begin(block)
        self.installed = threads.install()

    def _enter_atomic(self):
        self.atomic.__enter__()

    async def _borrow(self):
        """Return the only connection to a database once no block uses it."""
        executor = threads.thread_sensitive_executor()
        while True:
            (connection, turn), cancelled = await run_to_the_end(
                executor, self._lend, None
            )
            if cancelled is not None:
                if turn is None:
                    belonging.unshare(connection)
                raise cancelled
            if turn is None:
                return connection

            def ready():
                return connection.turn is not turn

            if not await turn.comes(ready, belonging.TURN_TIMEOUT):
                raise belonging.waited_in_vain(connection)

    def _lend(self):
        """
        Return the thread's connection, and a turn if that has to end first.

        Since this runs in that thread, no statement is on its way.
        """
        connection = connections[self.block.alias]
        if connection.blocks:
            belonging.share(connection)
        if connection.turn is None:
            belonging.share(connection, lent=True)
            return connection, None
        return connection, connection.turn

    def _uninstall(self):
        threads.uninstall(self.installed)

    def _exit_atomic(self, *exc_info):
        try:
            super()._exit_atomic(*exc_info)
        finally:
            self._dispose()

    def _dispose(self):
        connection = self.block.connection
        self.block.ended = True
        lent = connection.lent_by is not None
        belonging.unshare(connection)
        if lent:
            connection.run_on_commit = []
        else:
            belonging.retire(connection, self.block)
            with suppress(Error):
                connection.close()
        self.executor.shutdown()


class ManualTransaction(_Transaction):
    """The time between aset_autocommit(False) and aset_autocommit(True)."""

    def __init__(self, alias):
        super().__init__(None, alias)

    def _enter_atomic(self):
        block = self.block
        block.connection.set_autocommit(False)
        block.manual = self
        block.thread_ident = get_ident()
        block.entered = True
        block.connection.blocks.append(block)

    async def leave(self):
        await self._wait_for_nested()
        await self._exit()

    def _exit_atomic(self, *exc_info):
        connection = self.block.connection
        # They are called in the task that ends the transaction.
        due = []
        connection.run_and_clear_commit_hooks = lambda: due.append(True)
        try:
            if exc_info:
                connection.rollback()
            # It fails in a transaction that has begun, which then goes on.
            connection.set_autocommit(True)
        finally:
            del connection.run_and_clear_commit_hooks
        if due:
            self.hooks, connection.run_on_commit = connection.run_on_commit, []
        self._dispose()


def _is_shared(connection):
    """
    Return whether a transaction can't have a connection of its own: because
    the database has but one, or because what precedes it is to be committed
    together with it.
    """
    return not connection.settings_dict["AUTOCOMMIT"] or (
        connection.vendor == "sqlite" and connection.is_in_memory_db()
    )


async def run_hook(func, robust, message):
    """Call a function or coroutine function given to on_commit()."""
    try:
        if isinstance(func, AsyncToSync):
            func = func.awaitable
        if iscoroutinefunction(func):
            await func()
        else:
            await sync_to_async(func)()
    except Exception as exc:
        if not robust:
            raise
        name = getattr(func, "__qualname__", func)
        logger.exception(message, name, exc)


async def run_to_the_end(executor, func, block):
    """
    Call `func` in the executor as code inside `block`. Return its result, and
    the CancelledError that came meanwhile or None.
    """

    def call():
        belonging.set_current(block)
        return func()

    # A future rather than a task, which asyncio.run() would cancel on its way
    # out together with the caller.
    future = asyncio.wrap_future(
        executor.submit(copy_context().run, belonging.for_task(call))
    )
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as exc:
            cancelled = exc
    return future.result(), cancelled
