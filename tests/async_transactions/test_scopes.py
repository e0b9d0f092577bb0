"""
Promise 9: blocks that follow each other share a connection and a thread.
"""

import asyncio
import gc
import threading

from asgiref.sync import async_to_sync, sync_to_async

from django.db import (
    close_old_connections,
    connection,
    connections,
    scopes,
    transaction,
)

from .base import FreshConnectionsTestCase, Rollback, is_native, names, wait_until
from .models import Entry


async def block(exception=None):
    """Return the session of a block, and the thread that it has for itself."""
    thread = None
    async with transaction.aatomic():
        await names()
        if not is_native():
            thread = await sync_to_async(threading.current_thread)()
        session = transaction.get_connection().connection
        if exception is not None:
            raise exception
    return session, thread


def is_closed(session):
    if connection.vendor == "mysql":
        return not session.open
    try:
        session.cursor()
    except connection.Database.Error:
        return True
    return False


class ScopeTests(FreshConnectionsTestCase):
    async def assertReused(self, *lease):
        self.assertEqual(await block(), lease)

    async def test_blocks_follow_each_other(self):
        lease = await block()
        for _ in range(3):
            await self.assertReused(*lease)

    async def test_after_a_rollback(self):
        lease = await block()
        with self.assertRaises(Rollback):
            await block(Rollback())
        await self.assertReused(*lease)

    async def test_after_a_cancellation(self):
        lease = await block()
        with self.assertRaises(asyncio.CancelledError):
            await block(asyncio.CancelledError())
        await self.assertReused(*lease)

    async def test_after_gather(self):
        lease = await block()
        async with transaction.aatomic():
            await asyncio.gather(*(names() for _ in range(5)))
        await self.assertReused(*lease)

    async def test_after_a_loop_in_the_block(self):
        lease = await block()
        async with transaction.aatomic():
            await sync_to_async(lambda: async_to_sync(names)())()
        self.assertIs((await block())[0], lease[0])

    async def test_one_of_many_is_kept(self):
        leases = await asyncio.gather(*(block() for _ in range(3)))
        self.assertEqual(len({session for session, _ in leases}), 3)
        first = await block()
        self.assertIn(first, leases)
        await self.assertReused(*first)
        others = [session for session, _ in leases if session is not first[0]]
        self.assertIs(wait_until(lambda: all(map(is_closed, others))), True)

    def test_one_loop_after_the_other(self):
        lease = async_to_sync(block)()
        self.assertEqual(async_to_sync(block)(), lease)

        async def runs():
            return await block()

        lease = asyncio.run(runs())
        self.assertEqual(asyncio.run(runs()), lease)

    def test_close_all(self):
        session, thread = async_to_sync(block)()
        connections.close_all()
        self.assertIs(is_closed(session), True)
        again = async_to_sync(block)()
        self.assertIs(again[1], thread)
        self.assertIsNot(again[0], session)

    def kept_connection(self):
        # Others may be kept without a session.
        [kept] = [kept for kept in scopes.idle_connections() if kept.connection]
        return kept

    def test_close_old_connections(self):
        session, _ = async_to_sync(block)()
        kept = self.kept_connection()
        kept.close_at = None
        close_old_connections()
        self.assertIs(async_to_sync(block)()[0], session)
        kept = self.kept_connection()
        kept.close_at = 0
        close_old_connections()
        self.assertIs(is_closed(session), True)

    async def test_not_while_it_could_be_taken(self):
        """A task closes nothing that another one is about to use."""
        session, _ = await block()
        await sync_to_async(connections.close_all)()
        self.assertIs(is_closed(session), False)

    async def test_a_broken_connection_is_not_kept(self):
        session, _ = await block()
        with self.assertRaises(Exception):
            async with transaction.aatomic():
                await sync_to_async(transaction.get_connection().connection.close)()
                await names()
        self.assertIsNot((await block())[0], session)

    async def test_a_connection_is_checked_after_a_while(self):
        if connection.vendor != "postgresql":
            self.skipTest("Others fail to close a closed one, or find it usable.")
        session, _ = await block()
        session.close()
        self.addCleanup(setattr, scopes, "CHECK_AFTER", scopes.CHECK_AFTER)
        scopes.CHECK_AFTER = 0
        self.assertIsNot((await block())[0], session)

    async def test_what_a_thread_may_still_use_is_not_kept(self):
        session, _ = await block()
        async with transaction.aatomic():
            await asyncio.to_thread(Entry.objects.count)
        self.assertIsNot((await block())[0], session)

    async def test_other_settings(self):
        session, _ = await block()
        settings = connection.settings_dict
        self.addCleanup(settings.update, CONN_MAX_AGE=settings["CONN_MAX_AGE"])
        settings["CONN_MAX_AGE"] = 60
        self.assertIsNot((await block())[0], session)

    async def test_autocommit_and_wrappers_are_those_of_a_new_connection(self):
        def wrapper(execute, *args):
            return execute(*args)

        async with transaction.aatomic():
            transaction.get_connection().execute_wrappers.append(wrapper)
            await transaction.asavepoint_create()
            await transaction.aset_rollback(True)
        async with transaction.aatomic():
            connection = transaction.get_connection()
            self.assertNotIn(wrapper, connection.execute_wrappers)
            self.assertEqual(connection.savepoint_ids, [])
            self.assertIs(await transaction.aget_rollback(), False)
            self.assertIs(await transaction.aget_autocommit(), False)
            self.assertEqual(connection.run_on_commit, [])

    def test_the_end_of_a_thread_is_the_end_of_its_scope(self):
        leases = []
        thread = threading.Thread(
            target=lambda: leases.append(asyncio.run(block())),
        )
        thread.start()
        thread.join()
        del thread
        gc.collect()
        [(session, worker)] = leases
        if worker is not None:
            worker.join(10)
        self.assertIs(worker is not None and worker.is_alive(), False)
        self.assertIs(is_closed(session), True)
