"""
Promise 7, through the ORM in native mode: cancelling a task cancels its query
on the server, and leaves a connection that's clean or discarded.
"""

import asyncio
import time
from unittest import mock

from django.contrib.auth.models import Group
from django.db import connection, connections, run_sync, transaction
from django.db.models import CharField, Func, Value

from .base import NativePoolTestCase, NativeTestCase
from .cancelling import cancel_everywhere
from .test_waiting import psycopg

NAME = "cancelled"


class Sleep(Func):
    function = "pg_sleep"
    output_field = CharField()


def sleeping():
    return Group.objects.annotate(slept=Sleep(Value(30))).values_list("slept")


async def slow_query():
    await sleeping().afirst()


async def slow_update():
    await Group.objects.filter(name="a").aupdate(name=Sleep(Value(30)))


async def slow_block():
    async with transaction.aatomic():
        await Group.objects.acreate(name="never")
        await slow_query()


async def slow_nested_block():
    async with transaction.aatomic():
        await Group.objects.acreate(name="never")
        async with transaction.aatomic():
            await slow_query()


async def slow_service():
    def service():
        with transaction.atomic():
            Group.objects.create(name="never")
            list(sleeping())

    await run_sync(service)


class Tests:
    available_apps = ["django.contrib.auth", "django.contrib.contenttypes"]
    options = {"application_name": NAME}

    def setUp(self):
        super().setUp()
        Group.objects.create(name="a")
        connections.close_all()

    def states(self):
        """Return the states of sessions other than idle ones."""
        params = connection.get_connection_params()
        params.pop("cursor_factory")
        params["application_name"] = "observer"
        with psycopg.connect(**params, autocommit=True) as conn:
            rows = conn.execute(
                "SELECT state FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = %s AND state <> 'idle'",
                [NAME],
            )
            return [state for (state,) in rows]

    async def assertClean(self):
        await asyncio.to_thread(self.assertBecomes, self.states, [])
        names = [name async for name in Group.objects.values_list("name", flat=True)]
        self.assertEqual(names, ["a"])

    def check(self, operation):
        async def main():
            task = asyncio.create_task(operation())
            await asyncio.to_thread(self.assertBecomes, self.states, ["active"])
            before = time.monotonic()
            task.cancel()
            await asyncio.wait([task], timeout=20)
            self.assertLess(time.monotonic() - before, 10)
            self.assertIs(task.cancelled(), True)
            await self.assertClean()
            # An end of the time is nothing else.
            with self.assertRaises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await operation()
            await self.assertClean()

        self.run_on_loop(main())

    def test_query(self):
        self.check(slow_query)

    def test_update(self):
        self.check(slow_update)

    def test_block(self):
        self.check(slow_block)

    def test_nested_block(self):
        self.check(slow_nested_block)

    def test_service(self):
        self.check(slow_service)

    def check_everywhere(self, operation):
        """What was committed is undone, so that each time is the same."""

        async def main():
            async for task in cancel_everywhere(self, operation):
                await asyncio.to_thread(self.assertBecomes, self.states, [])
                await Group.objects.filter(name="b").adelete()
                await self.assertClean()
            self.assertIs(task.cancelled(), False)

        self.run_on_loop(main())

    def test_create(self):
        async def operation():
            await Group.objects.acreate(name="b")

        self.check_everywhere(operation)

    def test_blocks(self):
        async def operation():
            async with transaction.aatomic():
                await Group.objects.acreate(name="b")
                async with transaction.aatomic():
                    await Group.objects.filter(name="b").aupdate(name="c")
                await Group.objects.filter(name="c").aupdate(name="b")

        self.check_everywhere(operation)

    def test_manual_transaction(self):
        async def operation():
            await transaction.aset_autocommit(False)
            try:
                await Group.objects.acreate(name="b")
                await transaction.acommit()
            except BaseException:
                await transaction.arollback()
                raise
            finally:
                await transaction.aset_autocommit(True)

        # What needn't wait for the server gives way to other tasks, too.
        name = "django.db.backends.postgresql.waiting.MAX_BUSY_TIME"
        with mock.patch(name, 0):
            self.check_everywhere(operation)

    def test_siblings(self):
        """Only the query of the cancelled task is cancelled."""

        def sleep():
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_sleep(1)")
                return "slept"

        async def main():
            other = asyncio.create_task(run_sync(sleep))
            await asyncio.to_thread(self.assertBecomes, self.states, ["active"])
            task = asyncio.create_task(slow_query())
            await asyncio.sleep(0.3)
            task.cancel()
            self.assertEqual(await other, "slept")
            await asyncio.wait([task])
            self.assertIs(task.cancelled(), True)
            await self.assertClean()

        self.run_on_loop(main())


class ScopeTests(Tests, NativeTestCase):
    pass


class PoolTests(Tests, NativePoolTestCase):
    pass
