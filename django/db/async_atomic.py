"""
The asynchronous counterpart of transaction.Atomic.

AsyncAtomic has no state machine of its own: it enters and leaves an Atomic in
a thread. Entering the outermost block of a task takes a connection and a
thread (see django.db.threads) for the transaction, which leaving it disposes
of, on every path: they're kept for the next one (see django.db.scopes), or
closed if anybody could still be using them. A nested block is entered and left
wherever the thread-sensitive synchronous code around it runs.

Entering and leaving run to their end once they have been given to a thread,
even if the task is cancelled meanwhile: otherwise the thread would go on with
nobody there to end what it began. If entering was cancelled, it's undone.

In native mode (see django.db.native) all of that is done in the bridge, on the
event loop. The transaction takes its session from the scope and leaves it
there. Its thread is started only if it's asked to run synchronous code.
"""

import asyncio
import logging
import threading
import weakref
from _thread import get_ident
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial, wraps
from inspect import isawaitable

from asgiref.sync import AsyncToSync

from django.db import belonging, connections, deserted, scopes, sharing, threads
from django.db.abandoned import cancel_statement
from django.db.async_calls import is_asynchronous
from django.db.utils import DEFAULT_DB_ALIAS, Error, OperationalError
from django.utils.connection import ConnectionDoesNotExist

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
        if not is_asynchronous(func):
            raise TypeError(
                "aatomic() can only decorate coroutine functions. Use atomic() for "
                "other functions, and aatomic() inside asynchronous generators, such "
                "as %r." % getattr(func, "__qualname__", func)
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
        while True:
            outer = belonging.open_block(alias)
            if outer is None:
                entry = _Transaction(atomic, alias)
            else:
                entry = _Nested(atomic, outer)
            # While it waited, the block around it may have ended.
            if await entry.enter():
                break
        self._entries.push(entry)

    async def __aexit__(self, exc_type, exc_value, traceback):
        await self._entries.pop().leave(exc_type, exc_value, traceback)


class _Entry:
    """A block that an AsyncAtomic has entered."""

    def __init__(self, atomic, alias, connection):
        self.atomic = atomic
        self.executor = None
        # django.db.native, if that's how its database is waited for.
        self.native = native_mode(alias)
        self.hooks = []
        self.block = belonging.Block(
            alias,
            connection,
            atomic,
            belonging.current(),
            strict=True,
            task=asyncio.current_task(),
        )

    async def leave(self, exc_type, exc_value, traceback):
        if asyncio._get_running_loop() is None:
            # A coroutine is destroyed whose loop was closed. The thread that
            # looks after that ends the transaction.
            return
        if exc_type is None and not self.block.ended:
            try:
                await self._wait_for_nested()
                await self.note_cancellations()
                if self.block.cancelled:
                    raise belonging.swallowed(self.block)
            except BaseException as exc:
                passed_on = False
                if self.block.cancelled:
                    # Before whoever leaves the block around it looks there.
                    passed_on = sharing.pass_on_cancellation(self.block)
                await self._exit(type(exc), exc, exc.__traceback__)
                if passed_on and not isinstance(exc, asyncio.CancelledError):
                    return
                raise
        await self._exit(exc_type, exc_value, traceback)

    async def note_cancellations(self):
        """
        Let calls of synchronous code that were cancelled be noted in native
        mode, too: asyncio tells their futures so in callbacks.
        """
        if self.native and threads.may_be_cancelled(self.block):
            await asyncio.sleep(0)

    async def _wait_for_nested(self):
        """Wait for blocks of tasks that were started inside to be left."""
        block, connection = self.block, self.block.connection
        turn = connection.turn
        task = asyncio.current_task()

        def ready():
            return block.ended or connection.blocks[-1] is block

        with suppress(IndexError):
            nested = connection.blocks[-1]
            if nested is not block and nested.task and nested.task() is task:
                # It can't be left before this returns.
                raise belonging.rolled_back(nested)
        timeout = sharing.TURN_TIMEOUT
        if turn is not None and not await turn.comes(ready, timeout):
            raise belonging.waited_in_vain(connection, timeout)

    async def _exit(self, exc_type=None, exc_value=None, traceback=None):
        func = partial(self._exit_atomic, exc_type, exc_value, traceback)
        turn = self.block.connection.turn
        if exc_type is not None and turn is not None:
            # Others are refused from here on, and don't delay the rollback.
            sharing.begin_rollback(self.block)
            cancel_statement(self.block.connection, turn.count)
        try:
            await self._run(func, urgent=exc_type is not None, shielded=True)
        finally:
            if self.block.ended:
                belonging.end(self.block)
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
                if self.native:
                    await self.native.run(undo, self.block, shielded=True)
                    raise
                await threads.run_to_the_end(self._executors(), undo, self.block)
            raise

    def _executors(self):
        """Give the executors for the block's own work."""
        yield self.executor
        # It may have been the thread of a function that returned since.
        for block in belonging.chain(self.block):
            if block.thread is not None and not block.ended:
                yield block.thread
        yield from threads.thread_sensitive_executors()

    async def _run(self, func, urgent=False, shielded=False):
        if self.native:
            return await self.native.run(func, self.block, shielded)
        executors = self._executors()
        result, cancelled = await threads.run_to_the_end(
            executors, func, self.block, urgent
        )
        if cancelled is not None:
            raise cancelled
        return result

    async def _run_hooks(self):
        """Call what on_commit() registered, outside of the transaction."""
        cancelled = None
        for _, func, robust in self.hooks:
            try:
                await run_hook(
                    func,
                    robust,
                    "Error calling %s in on_commit() during transaction (%s).",
                    self.block.alias,
                )
            except asyncio.CancelledError as exc:
                cancelled = exc
        if cancelled is not None:
            raise cancelled


class _Nested(_Entry):
    """A block inside another one, so a savepoint as a rule."""

    def __init__(self, atomic, outer):
        super().__init__(atomic, outer.alias, outer.connection)
        self.outer = outer
        # Who has outlived a block would be refused.
        self.parent = self.block.parent
        self.block.parent = belonging.outside(outer.alias, self.parent)

    async def enter(self):
        """Return whether the block around it was there to be entered."""
        if self.native is None:
            self.executor = next(threads.thread_sensitive_executors())
        enter_in_turn = sharing.in_turn(self._enter_atomic)
        timeout = sharing.TURN_TIMEOUT
        while not self.outer.ended:
            if not await sharing.its_turn(self.block):
                raise belonging.waited_in_vain(self.block.connection, timeout)
            _, entered = await self._enter(enter_in_turn)
            if entered:
                self.block.parent = self.parent
                belonging.begin(self.block)
                return True
        if self.outer.strict:
            # Not to be committed, or else without what it's a part of.
            raise belonging.outlived(self.outer.alias, self.outer)
        return False

    def _enter_atomic(self):
        if self.outer.ended:
            return False
        sharing.share(self.block.connection)
        self.atomic.__enter__()
        return True


class _Transaction(_Entry):
    """An outermost block, with a connection and a thread of its own."""

    def __init__(self, atomic, alias):
        super().__init__(atomic, alias, None)
        # The connection that is lent to this transaction, if any.
        self.lender = None
        self.scope = scopes.current()
        self.installed = None

    async def enter(self):
        """Return True."""
        block = self.block
        lease = self._take()
        block.connection = connection = lease.connection
        if _is_single(connection):
            try:
                await self._borrow()
            except BaseException:
                if lease.worker is not None:
                    lease.close()
                raise
        block.thread = self.executor = threads.TransactionThread(
            f"transaction of {block}",
            clean_up=scopes.close_those_of_the_thread,
            loop=asyncio.get_running_loop(),
            deserted=self._desert,
            worker=lease.worker,
        )
        try:
            await self._enter(self._enter_atomic)
        except BaseException:
            if not block.ended and self.native:
                await self.native.run(self._dispose, shielded=True)
            elif not block.ended:
                executors = self._executors()
                if not self.executor.is_running():
                    # It couldn't be started.
                    executors = threads.thread_sensitive_executors()
                await threads.run_to_the_end(executors, self._dispose, block)
            raise
        belonging.begin(block)
        self.installed = threads.install(block)
        if self.native:
            deserted.watch.add(
                block, asyncio.get_running_loop(), partial(desert_session, block)
            )
        return True

    def _take(self):
        """Return a connection, and the thread that was kept with it if any."""
        alias = self.block.alias
        if self.native:
            self.native.check(alias)
            connection = make_connection(alias)
            self.native.inherit(connection)
            if not _is_single(connection):
                self.native.take_session(self.scope, connection)
            return scopes.Lease(connection)
        lease = self.scope.take(alias, connections.settings)
        return scopes.Lease(make_connection(alias)) if lease is None else lease

    def _enter_atomic(self):
        self.atomic.__enter__()

    async def _borrow(self):
        """Wait for the only connection to the database to be lent."""
        timeout = sharing.TURN_TIMEOUT
        while True:
            (lender, turn), cancelled = await self._ask_lender()
            if turn is None:
                self.lender = lender
            if cancelled is not None:
                self._give_back()
                raise cancelled
            if turn is None:
                return

            def ready():
                return lender.turn is not turn or not lender.blocks

            if not await turn.comes(ready, timeout):
                raise belonging.waited_in_vain(lender, timeout)

    async def _ask_lender(self):
        """Return what _lend() does, and a CancelledError of the meantime."""
        if not self.native:
            # A thread that a transaction on another database has doesn't have
            # the connection.
            return await threads.run_to_the_end(
                threads.executors_outside(), self._lend, None
            )
        # Nothing in it waits but for connecting, before anything is lent.
        return await self.native.run(self._lend), None

    def _lend(self):
        """
        Lend the thread's connection to the transaction, or in native mode that
        of its scope. Return it, and a turn if that has to end first.

        Since this runs in that thread, no statement is on its way.
        """
        lender = connections[self.block.alias]
        if lender.blocks:
            sharing.share(lender)
        if lender.blocks or (lender.turn is not None and not lender.serves_scope):
            return lender, lender.turn
        lender.ensure_connection()
        if lender.serves_scope:
            with sharing.taking_turn(lender):
                self._lend_session(lender)
        else:
            self._lend_session(lender)
        return lender, None

    def _lend_session(self, lender):
        # In this order: threads of a live server may share it, and whoever
        # finds a turn has to find the block that it waits for.
        lender.blocks.append(self.block)
        sharing.share(lender, lent=True)
        _copy(LENT_ATTRIBUTES, lender, self.block.connection)

    def _give_back(self):
        lender, borrower = self.lender, self.block.connection
        if lender is None:
            return
        # If it was closed, it's closed for both.
        lender.connection, borrower.connection = borrower.connection, None
        lender.run_on_commit += borrower.run_on_commit
        lender.blocks.clear()
        if lender.serves_scope:
            lender.turn.changed()
        else:
            sharing.unshare(lender)

    def _uninstall(self):
        belonging.run_where_opened(self.block, threads.uninstall, self.installed)
        # It refers to the context, and that to the scope.
        self.installed = None

    def _exit_atomic(self, exc_type, *exc_info):
        connection = self.block.connection
        rolls_back = connection.needs_rollback and not connection.closed_in_transaction
        try:
            if connection.vendor == "sqlite" and (exc_type is not None or rolls_back):
                # If a query was cancelled, SQLite interrupts the ROLLBACK as
                # well, as long as there is an unfinished cursor.
                with sharing.taking_turn(connection, leaving=True):
                    close_cursors(connection)
            super()._exit_atomic(exc_type, *exc_info)
            if exc_type is None and rolls_back and connection.connection is None:
                # A nested block couldn't be rolled back, of which atomic()
                # doesn't tell.
                raise OperationalError(
                    f"The block that {self.block} opened on the database "
                    f"'{self.block.alias}' was rolled back, because the connection "
                    "was lost inside of it."
                )
        finally:
            self._dispose()

    def _desert(self):
        """Roll back after the event loop was closed with the block open."""
        belonging.set_current(self.block)
        with suppress(Exception):
            self._exit_atomic(GeneratorExit, GeneratorExit(), None)

    def _dispose(self):
        block, connection = self.block, self.block.connection
        block.ended = True
        turn = connection.turn
        self.executor.shutdown()
        worker = self.executor.spare_worker()
        self._give_back()
        sharing.retire(connection, block)
        if self.native:
            deserted.watch.discard(block)
            is_idle = not self.executor.is_busy()
        else:
            is_idle = worker is not None
        if not is_idle or turn is None or turn.threads - self.executor.idents:
            # A cursor of somebody else may still refer to the driver's
            # connection, which a pool would hand on.
            with suppress(Error), connection.wrap_database_errors:
                if connection.connection is not None:
                    connection.connection.close()
            _close(connection)
        else:
            close_cursors(connection)
            if not _is_keepable(connection):
                _close(connection)
        if connection.closed_in_transaction:
            # The block couldn't be left, for which close() keeps the session.
            connection.connection = None
        if self.native:
            if not self.native.give_session(self.scope, connection):
                _close(connection)
        elif worker is not None:
            lease = scopes.Lease(_successor(connection), worker)
            if self.scope.keep(lease):
                self.executor.keep(worker)
            else:
                _close(lease.connection)
        # It closes what it keeps when nobody refers to it any more.
        self.scope = None


class ManualTransaction(_Transaction):
    """The time between aset_autocommit(False) and aset_autocommit(True)."""

    def __init__(self, alias):
        super().__init__(None, alias)
        # What on_commit() registered before the last commit.
        self.committed_hooks = []

    def _enter_atomic(self):
        block = self.block
        block.connection.set_autocommit(False)
        block.manual = self
        block.thread_ident = get_ident()
        block.entered = True
        block.connection.blocks.append(block)

    def commit(self, connection):
        """Commit, in the transaction's thread."""
        if self.block.cancelled:
            self.rollback(connection)
            raise belonging.swallowed(self.block)
        with sharing.taking_turn(connection):
            connection.commit()
            # Whoever was cancelled meanwhile calls rollback(), which drops
            # them.
            self.committed_hooks += connection.run_on_commit
            connection.run_on_commit = []

    def rollback(self, connection):
        """Roll back, in the transaction's thread."""
        with sharing.taking_turn(connection):
            connection.rollback()
            self.block.cancelled = False

    async def leave(self):
        try:
            await self._wait_for_nested()
        except asyncio.CancelledError as exc:
            await self._exit(type(exc), exc, exc.__traceback__)
            raise
        await self._exit()

    def _exit_atomic(self, exc_type, exc_value, traceback):
        connection = self.block.connection
        # They are called in the task that ends the transaction.
        due = []
        connection.run_and_clear_commit_hooks = lambda: due.append(True)
        try:
            if exc_type is not None:
                sharing.abandon_nested(connection, self.block)
                connection.rollback()
            # It fails in a transaction that has begun, which then goes on.
            connection.set_autocommit(True)
        except Error:
            if exc_type is None and connection.is_usable():
                raise
            self._dispose()
            if exc_type is None:
                raise
            return
        finally:
            del connection.run_and_clear_commit_hooks
        self.hooks = self.committed_hooks
        if due:
            self.hooks += connection.run_on_commit
            connection.run_on_commit = []
        self._dispose()


# The state of a connection that stands for the session of the driver.
SESSION_ATTRIBUTES = [
    "autocommit",
    "close_at",
    "connection",
    "health_check_done",
    "health_check_enabled",
    "isolation_level",
    "mysql_server_data",
    "transaction_mode",
]

LENT_ATTRIBUTES = [*SESSION_ATTRIBUTES, "force_debug_cursor", "queries_log"]


def make_connection(alias):
    """
    Return a connection for a block, bound to no thread.

    Raise ConnectionDoesNotExist if there's no such alias.
    """
    if alias not in connections:
        raise ConnectionDoesNotExist(f"The connection '{alias}' doesn't exist.")
    connection = connections.create_connection(alias)
    # What's set on a connection doesn't refer to it, which would leave it to
    # the garbage collector.
    ref = weakref.ref(connection)
    if connection.settings_dict["OPTIONS"].get("pool"):
        connection.get_new_connection = partial(_get_pooled, ref)
    connection.cursors = weakref.WeakSet()
    connection.create_cursor = partial(_create_cursor, ref)
    connection._commit = partial(_commit, ref)
    connection.set_autocommit = partial(_set_autocommit, ref)
    sharing.share(connection)
    connection._thread_ident = None
    return connection


def _successor(connection):
    """
    Return a connection which has the session of a retired one. What still
    refers to that doesn't get at the session.
    """
    successor = make_connection(connection.alias)
    move_session(connection, successor)
    return successor


def move_session(source, target):
    _copy(SESSION_ATTRIBUTES, source, target)
    source.connection = None
    # As connect() does. It's said of the session that the target had before.
    target.closed_in_transaction = False


def _copy(names, source, target):
    for name in names:
        if name in vars(source):
            setattr(target, name, getattr(source, name))


def _create_cursor(ref, *args, **kwargs):
    """Note the cursor, for close_cursors()."""
    connection = ref()
    cursor = type(connection).create_cursor(connection, *args, **kwargs)
    connection.cursors.add(cursor)
    if connection.vendor == "sqlite":
        cursor.close = partial(_close_alone, weakref.ref(cursor), threading.Lock())
    return cursor


def _close_alone(ref, lock):
    """
    Close a cursor of sqlite3. Whoever uses it may do so while the block is
    left, which closes it, too. Both would free its statement, and crash the
    process.
    """
    if (cursor := ref()) is None:
        # It was closed when it was freed.
        return
    with lock:
        type(cursor).close(cursor)


def _commit(ref):
    """Let the error say so if nobody can tell whether it was done."""
    connection = ref()
    was_closed = getattr(connection.connection, "closed", False)
    try:
        type(connection)._commit(connection)
    except Error as exc:
        if was_closed or connection.is_usable():
            raise
        raise OperationalError(
            "The connection was lost during the COMMIT, so it's unknown whether the "
            f"transaction was committed. {exc}"
        ) from exc.__cause__


def _set_autocommit(ref, autocommit, *args, **kwargs):
    """
    Don't connect again, as atomic() does after an error that closed the
    connection: its failure would hide that error. The next use connects.
    """
    connection = ref()
    if (
        autocommit
        and connection.connection is None
        and connection.settings_dict["AUTOCOMMIT"]
    ):
        connection.autocommit = True
    else:
        type(connection).set_autocommit(connection, autocommit, *args, **kwargs)


def close_cursors(connection):
    """
    Close the driver's cursors. Not everything that they're asked for gets past
    the connection, which refuses it, and on SQLite they hold what they read.
    """
    for cursor in list(connection.cursors):
        with suppress(Error), connection.wrap_database_errors:
            cursor.close()


def native_mode(alias):
    """Return django.db.native if that's how a database is waited for."""
    return connections.native if alias in connections.native_aliases else None


def desert_session(block):
    """
    Have the server roll back after the event loop was closed. Whoever has the
    turn in native mode never gives it back.
    """
    connection = block.connection
    block.ended = True
    with ending_session(connection):
        sharing.retire(connection, block)
        _close(connection)


@contextmanager
def ending_session(connection):
    """
    Cancel the query and close the session of code that nobody continues, and
    let the caller close its connection.
    """
    with suppress(Exception):
        connection.cancel_query()
    session = connection.connection
    # If the code's coroutine is being closed, another thread rolls back at the
    # moment, and mustn't lose its session in the middle of it. If the code was
    # suspended while it had the lock, that never comes.
    is_locked = session is not None and session.lock.acquire(timeout=1)
    try:
        with suppress(Exception):
            session.close()
        yield
    finally:
        if is_locked:
            session.lock.release()


def _close(connection):
    with suppress(Error):
        connection.close()


def _is_keepable(connection):
    """
    Return whether the next transaction can use the session, and whether no
    pool keeps it.
    """
    return (
        not connection.in_atomic_block
        and not connection.errors_occurred
        and connection.autocommit == connection.settings_dict["AUTOCOMMIT"]
        and getattr(connection, "pool", None) is None
    )


def _get_pooled(ref, conn_params):
    """Let the error say what to do if there's no connection in the pool."""
    connection = ref()
    try:
        return type(connection).get_new_connection(connection, conn_params)
    except connection.Database.OperationalError as exc:
        exc.args = (
            f"{exc}. If the server can be reached, all connections of the pool are in "
            "use: each transaction and each new_connection() holds one, also while "
            "another one is open inside of it. Increase the pool's max_size, or let "
            "fewer of them be open at a time.",
        )
        raise


def _is_single(connection):
    """
    Return whether a transaction can't have a session of its own: because the
    database has but one, or because what precedes it is to be committed
    together with it.
    """
    return not connection.settings_dict["AUTOCOMMIT"] or (
        connection.vendor == "sqlite" and connection.is_in_memory_db()
    )


async def run_hook(func, robust, message, alias):
    """
    Call a function or coroutine function given to on_commit() of a connection
    to `alias`.
    """
    if isinstance(func, AsyncToSync):
        func = func.awaitable
    try:
        if is_asynchronous(func):
            await func()
            return
        # To its end, so that it isn't lost with a task that's cancelled.
        if native := native_mode(alias):
            result = await native.run(func, shielded=True)
            if isawaitable(result):
                await result
            return
        result, cancelled = await threads.run_to_the_end(
            threads.thread_sensitive_executors(), func, belonging.current()
        )
        if isawaitable(result):
            await result
    except Exception as exc:
        if not robust:
            raise
        name = getattr(func, "__qualname__", func)
        logger.exception(message, name, exc)
    else:
        if cancelled is not None:
            raise cancelled


async def run_in_thread(func, alias):
    """
    Call `func`, which uses `alias`, where sync_to_async() would. If the task
    is cancelled, raise that at the end.
    """
    if native := native_mode(alias):
        return await native.run(func, shielded=True)
    belonging.claim()
    result, cancelled = await threads.run_to_the_end(
        threads.thread_sensitive_executors(), func, belonging.current()
    )
    if cancelled is not None:
        raise cancelled
    return result
