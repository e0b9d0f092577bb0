"""
Connections that a block of code has for itself.

new_connection() puts a block without an Atomic at the bottom of a fresh
connection's stack (see django.db.belonging): code inside joins it as it would
join a transaction, atomic() and aatomic() nest in it, and the connection of a
transaction around it isn't found any more, until the block is left.

If the event loop is closed with such a block open, nobody leaves it. So while
there are any in coroutines, a thread looks after their loops.
"""

import asyncio
from contextlib import suppress
from functools import partial, wraps

from django.db import belonging, connections, deserted, sharing, threads
from django.db.abandoned import cancel_statement
from django.db.async_atomic import (
    close_cursors,
    desert_session,
    make_connection,
    native_mode,
)
from django.db.async_calls import is_asynchronous
from django.db.utils import Error, NotSupportedError


class NewConnection:
    """
    A context manager and decorator, for both colours of code.

    This is a private API.
    """

    def __init__(self, using):
        self._using = using
        # The entries that haven't been left, the last one at the end.
        self._entries = belonging.Entries()

    def __call__(self, func):
        if is_asynchronous(func):

            @wraps(func)
            async def inner(*args, **kwargs):
                async with NewConnection(self._using):
                    return await func(*args, **kwargs)

        else:

            @wraps(func)
            def inner(*args, **kwargs):
                with NewConnection(self._using):
                    return func(*args, **kwargs)

        return inner

    def __enter__(self):
        self._begin(task=None)

    def __exit__(self, exc_type, exc_value, traceback):
        for block in reversed(self._entries.pop()):
            _close(block)
            belonging.end(block)

    async def __aenter__(self):
        loop = asyncio.get_running_loop()
        for block in self._begin(task=asyncio.current_task()):
            deserted.watch.add(block, loop, partial(_desert, block))

    async def __aexit__(self, exc_type, exc_value, traceback):
        if asyncio._get_running_loop() is None:
            # A coroutine is destroyed whose loop was closed.
            return
        cancelled = None
        for block in reversed(self._entries.pop()):
            if exc_type is None and cancelled is None:
                try:
                    await _wait_for_nested(block)
                except asyncio.CancelledError as exc:
                    cancelled = exc
            try:
                await _close_to_the_end(block)
            except asyncio.CancelledError as exc:
                cancelled = exc
            belonging.end(block)
            deserted.watch.discard(block)
        if cancelled is not None:
            raise cancelled

    def _begin(self, task):
        if self._using is None:
            aliases = list(connections)
        elif isinstance(self._using, str):
            aliases = [self._using]
        else:
            aliases = self._using
        blocks = [_open(alias, task) for alias in aliases]
        for block in blocks:
            block.parent = belonging.current()
            belonging.begin(block)
        self._entries.push(blocks)
        return blocks


def new_connection(using=None):
    """
    Give the code inside connections of its own.

    `using` is a database alias or an iterable of them; by default they are
    all meant. The connections are opened at their first use, in autocommit
    mode, and closed, or returned to their pool, at the end. A transaction
    around the block is paused: it neither contains nor sees what's done
    inside, until that's committed.

    The result is a context manager and a decorator, for synchronous and for
    asynchronous code. Blocks of it can be nested.

    Raise TransactionManagementError in a TestCase, whose rollback it would
    escape, and NotSupportedError for an in-memory SQLite database, which has
    but one connection.
    """
    # Bare decorator: @new_connection -- although the first argument is called
    # `using`, it's actually the function being decorated.
    if callable(using):
        return NewConnection(None)(using)
    # Decorator: @new_connection(...) or context manager.
    return NewConnection(using)


async def _wait_for_nested(block):
    """Wait for blocks of tasks that were started inside to be left."""
    connection = block.connection
    await connection.turn.comes(
        lambda: connection.blocks[-1] is block, sharing.TURN_TIMEOUT
    )


def _open(alias, task):
    for block in belonging.chain(belonging.current()):
        if block.alias == alias and block.atomic and block.atomic._from_testcase:
            raise belonging.error(
                "new_connection() would escape the transaction of this TestCase. "
                "Use TransactionTestCase to test it."
            )
    connection = make_connection(alias)
    if connection.vendor == "sqlite" and connection.is_in_memory_db():
        raise NotSupportedError(
            f"new_connection() can't be used for the database '{alias}', because an "
            "in-memory SQLite database has but one connection."
        )
    block = belonging.Block(
        alias, connection, None, belonging.current(), strict=True, task=task
    )
    block.entered = True
    connection.blocks.append(block)
    return block


def _close(block):
    connection, turn = block.connection, block.connection.turn
    sharing.retire(connection, block)
    if turn is None or not turn.depth:
        # Or else a statement is running, and no pool takes it back like that.
        close_cursors(connection)
    with suppress(Error):
        connection.close()


async def _close_to_the_end(block):
    """Close it even if the task is cancelled, and raise that at the end."""
    close = partial(_close, block)
    if native := native_mode(block.alias):
        await native.run(close, shielded=True)
        return
    _, cancelled = await threads.run_to_the_end(
        threads.thread_sensitive_executors(), close, None
    )
    if cancelled is not None:
        raise cancelled


def _desert(block):
    """Close it after its event loop was closed."""
    connection = block.connection
    if native_mode(block.alias):
        desert_session(block)
        return
    belonging.set_current(block)
    try:
        cancel_statement(connection, connection.turn.count)
        with sharing.taking_turn(connection, leaving=True):
            block.ended = True
    finally:
        _close(block)
