"""
The asynchronous counterparts of the functions of django.db.transaction.

All but one call the method that their counterpart calls, as asynchronous
methods of the ORM do, so inside a block on its connection.

The time between aset_autocommit(False) and aset_autocommit(True) is a
transaction as well. Its connection and its thread are those which an outermost
aatomic() would have.
"""

from contextlib import asynccontextmanager

from django.db import belonging, connections, sharing
from django.db.async_atomic import ManualTransaction, run_hook, run_in_thread
from django.db.async_calls import sync_to_async
from django.db.utils import DEFAULT_DB_ALIAS


async def _call(using, name, *args):
    alias = using or DEFAULT_DB_ALIAS

    def call():
        return getattr(connections[alias], name)(*args)

    return await sync_to_async(call, using=alias)()


async def _call_to_the_end(using, name):
    """Call a method even if the task is cancelled meanwhile."""
    alias = using or DEFAULT_DB_ALIAS
    block = belonging.open_block(alias)
    if block is not None and block.manual is not None:
        await block.manual.note_cancellations()

    def call():
        connection = connections[alias]
        if block is None or block.manual is None:
            getattr(connection, name)()
        else:
            getattr(block.manual, name)(connection)

    await run_in_thread(call, alias)


async def aget_autocommit(using=None):
    """Get the autocommit status of the connection."""
    return await _call(using, "get_autocommit")


async def aset_autocommit(autocommit, using=None):
    """
    Set the autocommit status of the connection.

    Unlike set_autocommit(), this has an effect for the current task and those
    it starts only. Others go on with the connections that they have.
    """
    alias = using or DEFAULT_DB_ALIAS
    block = belonging.open_block(alias)
    if block is None and not autocommit and connections.settings[alias]["AUTOCOMMIT"]:
        await ManualTransaction(alias).enter()
    elif autocommit and block is not None and block.manual is not None:
        # Unless a block inside of it has been outlived.
        await belonging.block_for(alias).manual.leave()
    else:
        await sync_to_async(_set_autocommit, using=alias)(alias, autocommit)


def _set_autocommit(alias, autocommit):
    connection = connections[alias]
    connection.set_autocommit(autocommit)
    sharing.note_autocommit(connection)


async def acommit(using=None):
    """Commit a transaction."""
    await _call_to_the_end(using, "commit")


async def arollback(using=None):
    """Roll back a transaction."""
    await _call_to_the_end(using, "rollback")


async def asavepoint_create(using=None):
    """
    Create a savepoint (if supported and required by the backend) inside the
    current transaction. Return its identifier, for asavepoint_rollback() or
    asavepoint_commit().
    """
    return await _call(using, "savepoint")


async def asavepoint_rollback(sid, using=None):
    """Roll back to a savepoint. Do nothing if they aren't supported."""
    await _call(using, "savepoint_rollback", sid)


async def asavepoint_commit(sid, using=None):
    """Release a savepoint. Do nothing if they aren't supported."""
    await _call(using, "savepoint_commit", sid)


async def aclean_savepoints(using=None):
    """Reset the counter used to generate unique savepoint ids."""
    await _call(using, "clean_savepoints")


async def aget_rollback(using=None):
    """Get the "needs rollback" flag -- for *advanced use* only."""
    return await _call(using, "get_rollback")


async def aset_rollback(rollback, using=None):
    """
    Set or unset the "needs rollback" flag -- for *advanced use* only. See
    set_rollback().
    """
    await _call(using, "set_rollback", rollback)


@asynccontextmanager
async def amark_for_rollback_on_error(using=None):
    """
    Mark the current transaction as "needs rollback" when an exception is
    raised inside. See mark_for_rollback_on_error().
    """
    try:
        yield
    except Exception as exc:
        connection = connections[using or DEFAULT_DB_ALIAS]
        if connection.in_atomic_block:
            sharing.mark_for_rollback(connection, exc)
        raise


async def aon_commit(func, using=None, robust=False):
    """
    Register `func`, a function or a coroutine function, to be called when the
    current transaction is committed. Outside of transactions, call it at once.
    """
    alias = using or DEFAULT_DB_ALIAS
    connection = connections[alias]
    if (
        connection.in_atomic_block
        or not callable(func)
        or not await aget_autocommit(using)
    ):
        await _call(using, "on_commit", func, robust)
    else:
        await run_hook(func, robust, "Error calling %s in on_commit() (%s).", alias)
