"""
Promise 11: the event loop goes on while tasks wait for locks, slow queries,
connections that are opened, a full pool, and the turns of other tasks.
"""

import asyncio
import time
import unittest
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from django.contrib.sites.models import Site
from django.db import DatabaseError, connection, connections, run_sync, transaction
from django.test import TransactionTestCase

from .base import PoolMixin
from .test_waiting import parameters

try:
    import psycopg
except ImportError:
    psycopg = None

# Seconds.
LONGEST_STALL = 0.05


class Heartbeat:
    """
    Measure for how long an event loop doesn't get round to a task.

    It doesn't count for how long the thread waited for a processor, which
    Linux knows: that's no stall, but other processes, or a slow machine.
    """

    async def __aenter__(self):
        self.longest = 0
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *exc_info):
        # Let it notice the last stall.
        await asyncio.sleep(0.002)
        self._task.cancel()

    async def _beat(self):
        while True:
            before = self._clock()
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, self._clock() - before)

    def _clock(self):
        waited = 0
        with suppress(OSError):
            # The time on the processor, waiting for it (in ns), and slices.
            waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
        return time.monotonic() - waited / 1e9


def execute(sql):
    with connection.cursor() as cursor:
        cursor.execute(sql)


@unittest.skipUnless(connections.native_aliases, "ASYNC_NATIVE is required.")
class HeartbeatTests(TransactionTestCase):
    available_apps = ["django.contrib.sites"]

    def setUp(self):
        self.site = Site.objects.create(domain="a", name="a")

    async def wait_for_lock(self):
        async with transaction.aatomic():
            await Site.objects.filter(pk=self.site.pk).aupdate(name="b")

    async def sleep_in_block(self):
        async with transaction.aatomic():
            await self.sleep()

    async def sleep(self):
        with self.assertRaisesMessage(DatabaseError, "canceling statement"):
            await run_sync(execute, "SELECT pg_sleep(30)")

    async def query(self):
        await Site.objects.acount()

    async def connect(self):
        unanswered = connection.copy("unanswered")
        host = {"HOST": "127.0.0.1", "PORT": self.port}
        unanswered.settings_dict.update(host, OPTIONS={})
        with self.assertRaises(psycopg.OperationalError):
            await run_sync(unanswered.connect)

    async def everybody_waits(self, observer):
        """Return whether it's so, for those that have a connection."""
        cursor = await observer.execute(
            "SELECT wait_event_type, count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND state = 'active' GROUP BY 1"
        )
        states = dict(await cursor.fetchall())
        # The event type of pg_sleep() is "Timeout".
        return [len(self.accepted), states.get("Lock"), states.get("Timeout")] == [
            10
        ] * 3

    async def start(self, group, func, number):
        for _ in range(number):
            group.create_task(func())
            # What each of them computes first isn't a stall for all others.
            await asyncio.sleep(0.001)

    async def measure(self, also):
        # None of what the test itself needs may block the event loop.
        async with AsyncExitStack() as stack:
            connect = psycopg.AsyncConnection.connect
            observer = await connect(**parameters(), autocommit=True)
            stack.push_async_callback(observer.close)
            holder = await connect(**parameters())
            stack.push_async_callback(holder.close)
            await holder.execute("SELECT FROM django_site FOR UPDATE")
            # It accepts connections, and says nothing.
            self.accepted = []
            server = await asyncio.start_server(
                lambda reader, writer: self.accepted.append(writer), "127.0.0.1"
            )
            stack.callback(server.close)
            self.port = server.sockets[0].getsockname()[1]
            heartbeat = await stack.enter_async_context(Heartbeat())
            group = await stack.enter_async_context(asyncio.TaskGroup())
            await self.start(group, self.connect, 10)
            await self.start(group, self.wait_for_lock, 10)
            await self.start(group, self.sleep_in_block, 9)
            # Without a pool, the queries share its connection.
            await self.start(group, self.sleep, 1)
            await self.start(group, self.query, 20)
            while not await self.everybody_waits(observer):
                await asyncio.sleep(0.01)
            if also is not None:
                await also()
            await asyncio.sleep(0.1)
            for writer in self.accepted:
                writer.close()
            await holder.rollback()
            await observer.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event = 'PgSleep'"
            )
        return heartbeat.longest

    def longest_stall(self, also=None):
        """
        Return how long the event loop stalls at most while 50 tasks wait at
        once, and `also` is awaited.
        """
        return asyncio.run(asyncio.wait_for(self.measure(also), 60))

    def test_no_stall(self):
        # Not all that slows a busy machine down is known. But what blocks the
        # event loop does so each time.
        for _ in range(3):
            stall = self.longest_stall()
            if stall < LONGEST_STALL:
                break
        self.assertLess(stall, LONGEST_STALL)

    def test_blocking_code(self):
        """It's noticed."""

        async def also():
            await run_sync(time.sleep, 0.06)

        self.assertGreater(self.longest_stall(also), LONGEST_STALL)

    def test_blocking_query(self):
        conn = psycopg.connect(**parameters())
        self.addCleanup(conn.close)

        async def also():
            await run_sync(conn.execute, "SELECT pg_sleep(0.06)")

        self.assertGreater(self.longest_stall(also), LONGEST_STALL)


class PooledHeartbeatTests(PoolMixin, HeartbeatTests):
    # Those that wait for the lock or are slow have all of them.
    pool_options = {"min_size": 20, "max_size": 20, "timeout": 20}

    def setUp(self):
        super().setUp()
        connection.pool.open(wait=True)

    async def everybody_waits(self, observer):
        waiting = connection.pool.get_stats()["requests_waiting"]
        return waiting == 20 and await super().everybody_waits(observer)
