"""
Promises 7, 8 and 10: a pool is the budget, and nothing is lost from it.
Without one, work outside of blocks shares the connection of its thread.
"""

import asyncio
import time

from django.db import OperationalError, connection, new_connection, transaction
from django.db.async_calls import sync_to_async
from django.db.backends.signals import connection_created

from . import server
from .base import (
    AsyncTransactionTestCase,
    Rollback,
    is_in_memory,
    is_native,
    names,
    until,
    wait_until,
)
from .models import Entry
from .pool import PoolTestCase, close_connections


class PoolTests(PoolTestCase):
    async def block(self, name, *awaitables):
        async with transaction.aatomic():
            await Entry.objects.acreate(name=name)
            for awaitable in awaitables:
                await awaitable

    async def hold(self, number):
        """
        Enter blocks that hold `number` connections. Return an event that lets
        them be left, and the tasks.
        """
        inside = [asyncio.Event() for _ in range(number)]
        over = asyncio.Event()

        async def holder(number, event):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"holder {number}")
                event.set()
                await until(over)

        tasks = [
            asyncio.create_task(holder(number, event))
            for number, event in enumerate(inside)
        ]
        await asyncio.gather(*map(until, inside))
        return over, tasks

    async def somebody_waits(self):
        pool = connection.pool
        self.assertIs(
            await asyncio.to_thread(
                wait_until, lambda: pool.get_stats().get("requests_waiting")
            ),
            True,
        )

    def test_never_more_sessions_than_max_size(self):
        async def task(number):
            try:
                async with transaction.aatomic():
                    await Entry.objects.acreate(name=f"{number}")
                    async with transaction.aatomic():
                        await Entry.objects.acreate(name=f"{number}, nested")
                    if number % 3 == 0:
                        raise Rollback
            except Rollback:
                pass

        async def main():
            async with asyncio.timeout(30):
                await asyncio.gather(*map(task, range(30)))

        # The last one waits for all others.
        connection.pool.timeout = 30
        with server.SessionWatch() as watch:
            asyncio.run(main())
        self.assertIs(wait_until(lambda: not self.checked_out()), True)
        self.assertEqual(watch.most, 2)
        self.assertEqual(Entry.objects.count(), 40)

    def test_exhausted(self):
        async def main():
            over, tasks = await self.hold(2)
            began = time.monotonic()
            with self.assertRaisesMessage(OperationalError, self.exhausted):
                await self.block("refused")
            self.assertLess(time.monotonic() - began, 3)
            over.set()
            await asyncio.gather(*tasks)
            await self.block("next")

        asyncio.run(main())
        close_connections()
        self.assertNames("holder 0", "holder 1", "next")

    exhausted = (
        "couldn't get a connection after 1.00 sec. If the server can be reached, all "
        "connections of the pool are in use: each transaction and each "
        "new_connection() holds one, also while another one is open inside of it. "
        "Increase the pool's max_size, or let fewer of them be open at a time."
    )

    def test_waits_for_its_turn(self):
        async def main():
            over, tasks = await self.hold(2)
            waits = asyncio.create_task(self.block("waited"))
            await self.somebody_waits()
            over.set()
            await asyncio.gather(waits, *tasks)

        asyncio.run(main())
        close_connections()
        self.assertNames("holder 0", "holder 1", "waited")

    def test_cancelled_while_it_waits(self):
        async def main():
            over, tasks = await self.hold(2)
            waits = asyncio.create_task(self.block("cancelled"))
            await self.somebody_waits()
            waits.cancel()
            # Not before the pool gives up, but not much later either.
            await asyncio.wait([waits], timeout=5)
            self.assertIs(waits.cancelled(), True)
            over.set()
            await asyncio.gather(*tasks)

        asyncio.run(main())
        close_connections()
        self.assertNames("holder 0", "holder 1")

    def test_cancelled_while_the_connection_arrives(self):
        async def main(number):
            over, tasks = await self.hold(2)
            waits = asyncio.create_task(self.block("waits"))
            await self.somebody_waits()
            over.set()
            # From before the first COMMIT until after the second one.
            await asyncio.sleep(number / 2000)
            waits.cancel()
            await asyncio.wait([waits, *tasks])
            async with transaction.aatomic():
                await Entry.objects.all().adelete()

        for number in range(30):
            asyncio.run(main(number))
            self.assertIs(wait_until(lambda: not self.checked_out()), True)

    def test_holders_that_wait_for_new_connection(self):
        """All of them hold a connection and wait for another one."""

        async def holder(number, all_inside):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"{number}")
                await until(all_inside)
                async with new_connection():
                    await Entry.objects.acount()

        async def main():
            all_inside = asyncio.Barrier(2)
            return await asyncio.gather(
                *[holder(number, all_inside) for number in range(2)],
                return_exceptions=True,
            )

        began = time.monotonic()
        results = asyncio.run(main())
        self.assertLess(time.monotonic() - began, 5)
        # One may get the connection of the other, which has given up.
        failures = [result for result in results if result is not None]
        self.assertGreater(len(failures), 0)
        for failure in failures:
            self.assertIsInstance(failure, OperationalError)
            self.assertIn(self.exhausted, str(failure))
        close_connections()
        self.assertEqual(Entry.objects.count(), 2 - len(failures))

    def test_new_connection_nested_many_times(self):
        async def nest(depth):
            async with new_connection():
                self.assertEqual(await names(), [])
                if depth:
                    await nest(depth - 1)

        async def main():
            with self.assertRaisesMessage(OperationalError, self.exhausted):
                await nest(2)
            await nest(1)

        asyncio.run(main())

    def test_autocommit_work_holds_one(self):
        """
        As it does in synchronous code: that of the thread. In native mode,
        queries run in parallel.
        """

        async def main():
            with server.SessionWatch() as watch:
                await asyncio.gather(*(Entry.objects.acount() for _ in range(50)))
            return watch

        self.assertEqual(asyncio.run(main()).most, 2 if is_native() else 1)


class ColdGatherTests(AsyncTransactionTestCase):
    """Promise 8."""

    def setUp(self):
        super().setUp()
        close_connections()
        self.addCleanup(close_connections)

    def test_a_thousand_queries_open_one_connection(self):
        if is_in_memory():
            self.skipTest("Connections to a database in memory aren't closed.")
        opened = []

        def created(connection, **kwargs):
            opened.append(connection.alias)

        async def main():
            await asyncio.gather(*(Entry.objects.acount() for _ in range(1000)))

        connection_created.connect(created)
        self.addCleanup(connection_created.disconnect, created)
        asyncio.run(main())
        self.assertEqual(opened, ["default"])

    def test_a_thousand_queries_as_the_server_sees_it(self):
        if not server.is_supported():
            self.skipTest("Needs a database server.")

        async def main():
            return await asyncio.gather(
                *(Entry.objects.acount() for _ in range(900)),
                *(function() for _ in range(100)),
            )

        function = sync_to_async(server.session_id)
        with server.SessionWatch() as watch:
            results = asyncio.run(main())
        self.assertEqual(set(results[900:]), watch.seen)
        self.assertEqual(watch.most, 1)
