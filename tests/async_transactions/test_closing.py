"""
Promises 5, 7 and 9: an event loop that runs for long can close what it doesn't
use, and gets over what was closed by others.
"""

import asyncio

from asgiref.sync import sync_to_async

from django.db import (
    OperationalError,
    aclose_old_connections,
    connection,
    connections,
    transaction,
)

from . import server
from .base import AsyncTransactionTestCase, is_in_memory, is_native, names, wait_until
from .models import Entry


async def block():
    """Return the session of a block that has ended since."""
    async with transaction.aatomic():
        await names()
        return transaction.get_connection().connection


async def sessions():
    return await asyncio.to_thread(server.ask, server.SESSIONS)


class ClosingTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        if is_in_memory():
            self.skipTest("Connections to a database in memory aren't closed.")
        connections.close_all()
        self.addCleanup(connections.close_all)

    async def test_close_all(self):
        if not server.is_supported():
            self.skipTest("Needs a database server.")
        before = await sessions()
        await names()
        await block()
        await sync_to_async(lambda: connection.ensure_connection())()
        self.assertGreater(len(await sessions()), len(before))
        await connections.aclose_all()
        are_closed = await asyncio.to_thread(
            wait_until, lambda: set(server.ask(server.SESSIONS)) <= set(before)
        )
        self.assertIs(are_closed, True)
        await block()
        self.assertEqual(await names(), [])

    async def test_block_is_left_alone(self):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="before")
            session = transaction.get_connection().connection
            await connections.aclose_all()
            await aclose_old_connections()
            self.assertIs(transaction.get_connection().connection, session)
            await Entry.objects.acreate(name="after")
        await self.assertAsyncNames("after", "before")

    async def test_block_of_another_task_is_left_alone(self):
        entered, closed = asyncio.Event(), asyncio.Event()

        async def other():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="before")
                entered.set()
                await closed.wait()
                await Entry.objects.acreate(name="after")

        task = asyncio.create_task(other())
        async with asyncio.timeout(10):
            await entered.wait()
            await connections.aclose_all()
            await aclose_old_connections()
            closed.set()
            await task
        await self.assertAsyncNames("after", "before")

    async def test_old_ones(self):
        async with transaction.aatomic():
            await names()
            transaction.get_connection().close_at = None
        session = await block()
        await aclose_old_connections()
        self.assertIs(await block(), session)
        async with transaction.aatomic():
            transaction.get_connection().close_at = 0
        await aclose_old_connections()
        self.assertIsNot(await block(), session)

    async def test_autocommit_after_the_session_was_ended(self):
        """
        A broken connection is replaced: in native mode at the next use, in a
        thread, as in synchronous code, when old connections are closed.
        """
        if not server.is_supported():
            self.skipTest("Needs a database server.")
        await names()
        before = await sessions()
        for session in before:
            await asyncio.to_thread(server.ask, server.END_SESSION, session)
        if not is_native():
            with self.assertRaises(OperationalError):
                await names()
            await aclose_old_connections()
        self.assertEqual(await names(), [])

    async def test_block_after_the_session_was_ended(self):
        if not server.is_supported():
            self.skipTest("Needs a database server.")
        await block()
        for session in await sessions():
            await asyncio.to_thread(server.ask, server.END_SESSION, session)
        try:
            await block()
        except OperationalError:
            await aclose_old_connections()
        await block()
