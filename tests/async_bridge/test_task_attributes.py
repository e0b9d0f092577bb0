"""
Promise 8: with a pool, what a task sets on the connection holds for its
operations and those of tasks it starts, and for no others.
"""

import asyncio
import contextvars
import random
from unittest import mock

from asgiref.sync import async_to_sync, sync_to_async

from django.contrib.auth.models import Group
from django.db import connection, connections, run_sync, transaction
from django.dispatch import Signal

from .base import NativePoolTestCase, NativeTestCase

SCHEMAS = ["a", "b", "c", "d"]


def current_schema():
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_schema()")
        return cursor.fetchone()[0]


class TenantsMixin:
    """As with django-tenants, a wrapper remembers the schema."""

    available_apps = ["django.contrib.auth", "django.contrib.contenttypes"]

    def setUp(self):
        super().setUp()
        with connection.cursor() as cursor:
            for schema in SCHEMAS:
                cursor.execute(f"CREATE SCHEMA {schema}")
                self.addCleanup(self.drop, schema)
                cursor.execute(
                    f"CREATE TABLE {schema}.auth_group "
                    "(LIKE public.auth_group INCLUDING ALL)"
                )
        connections.close_all()
        connection.close_pool()
        settings = connections.settings["default"]
        self.patch(mock.patch.dict(settings, ENGINE="async_bridge.tenants"))

    def drop(self, schema):
        with connection.cursor() as cursor:
            cursor.execute(f"DROP SCHEMA {schema} CASCADE")


class TenantTests(TenantsMixin, NativePoolTestCase):
    def test_operations(self):
        """Operations of four tenants mix on two sessions."""
        choice = random.Random(0)

        async def tenant(schema):
            if schema != "public":
                connection.set_schema(schema)
            for number in range(25):
                self.assertEqual(await run_sync(current_schema), schema)
                await Group.objects.acreate(name=f"{schema} {number}")
                await asyncio.sleep(choice.random() / 1000)
                self.assertEqual(connection.schema_name, schema)

        async def main():
            await asyncio.gather(*map(tenant, [*SCHEMAS, "public"]))

        self.run_on_loop(main())
        with connection.cursor() as cursor:
            for schema in [*SCHEMAS, "public"]:
                cursor.execute(f"SELECT name FROM {schema}.auth_group ORDER BY id")
                self.assertEqual(
                    cursor.fetchall(),
                    [(f"{schema} {number}",) for number in range(25)],
                )

    def test_transactions(self):
        async def tenant(schema):
            if schema != "public":
                connection.set_schema(schema)
            for number in range(10):
                async with transaction.aatomic():
                    self.assertEqual(connection.schema_name, schema)
                    self.assertEqual(await run_sync(current_schema), schema)
                    await Group.objects.acreate(name=f"{schema} {number}")
                names = [group.name async for group in Group.objects.order_by("id")]
                self.assertEqual(len(names), number + 1)
                self.assertEqual(names[-1], f"{schema} {number}")

        async def main():
            await asyncio.gather(*map(tenant, [*SCHEMAS, "public"]))

        self.run_on_loop(main())

    def test_changed(self):
        async def main():
            for schema in ["a", "b", "a", "public"]:
                connection.set_schema(schema)
                self.assertEqual(await run_sync(current_schema), schema)

        self.run_on_loop(main())

    def test_started_task(self):
        async def main():
            connection.set_schema("a")
            self.assertEqual(await run_sync(current_schema), "a")
            found = await asyncio.gather(*[run_sync(current_schema) for _ in range(5)])
            self.assertEqual(found, ["a"] * 5)

        self.run_on_loop(main())

    def test_started_in_an_operation(self):
        """
        Who starts it has set the search path of its session, which is another.
        """

        async def task():
            return await run_sync(current_schema)

        def operation():
            found = [current_schema()]
            found += async_to_sync(start)()
            return found

        async def start():
            return await asyncio.gather(task())

        async def main():
            connection.set_schema("a")
            return await run_sync(operation)

        self.assertEqual(self.run_on_loop(main()), ["a", "a"])

    def test_helpers(self):
        """What a wrapper has made for itself isn't inherited."""

        async def task():
            return await run_sync(
                lambda: connection.tenants.connection is connections["default"]
            )

        async def main():
            connection.set_schema("a")
            self.assertIs(await task(), True)
            self.assertIs(await asyncio.create_task(task()), True)

        self.run_on_loop(main())


class TenantsWithoutPoolTests(TenantsMixin, NativeTestCase):
    """The tasks of a scope share a wrapper. Blocks take what it remembers."""

    def test_blocks(self):
        async def main():
            for schema in ["a", "b", "public", "a"]:
                connection.set_schema(schema)
                self.assertEqual(await run_sync(current_schema), schema)
                async with transaction.aatomic():
                    self.assertEqual(await run_sync(current_schema), schema)
                    connection.set_schema("c")
                    self.assertEqual(await run_sync(current_schema), "c")
                self.assertEqual(await run_sync(current_schema), schema)
                self.assertEqual(connection.schema_name, schema)

        self.run_on_loop(main())


class AttributesTests(NativePoolTestCase):
    """Promise 8, for what users set on Django's own wrapper."""

    async def get(self):
        """Return what holds for an operation of the current task."""

        def get():
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            return getattr(connection, "tenant", None)

        return await run_sync(get)

    def test_task(self):
        async def main():
            connection.tenant = 1
            self.assertEqual(connection.tenant, 1)
            for _ in range(3):
                self.assertEqual(await self.get(), 1)

        self.run_on_loop(main())

    def test_set_in_an_operation(self):
        async def main():
            await run_sync(setattr, connection, "tenant", 1)
            self.assertEqual(await self.get(), 1)
            self.assertEqual(await asyncio.create_task(self.get()), 1)

        self.run_on_loop(main())

    def test_started_tasks(self):
        async def parent():
            return await self.get(), await asyncio.create_task(self.get())

        async def main():
            connection.tenant = 1
            self.assertEqual(await asyncio.create_task(parent()), (1, 1))
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.get()) for _ in range(3)]
            self.assertEqual([task.result() for task in tasks], [1, 1, 1])

        self.run_on_loop(main())

    def test_task_that_goes_on(self):
        """It was started by a task that has finished."""

        async def start():
            connection.tenant = 1
            return asyncio.create_task(later())

        async def later():
            await proceed.wait()
            return await self.get()

        async def main():
            nonlocal proceed
            proceed = asyncio.Event()
            task = await asyncio.create_task(start())
            await asyncio.create_task(self.get())
            proceed.set()
            self.assertEqual(await task, 1)
            self.assertIsNone(await self.get())

        proceed = None
        self.run_on_loop(main())

    def test_siblings(self):
        async def sibling(number):
            connection.tenant = number
            await asyncio.sleep(0)
            for _ in range(3):
                self.assertEqual(await self.get(), number)

        async def main():
            await self.get()
            await asyncio.gather(*map(sibling, range(5)))
            self.assertIsNone(await self.get())
            self.assertIsNone(await asyncio.create_task(self.get()))

        self.run_on_loop(main())

    def test_child_and_parent(self):
        async def child():
            connection.tenant = 2
            return await self.get()

        async def main():
            connection.tenant = 1
            self.assertEqual(await asyncio.create_task(child()), 2)
            self.assertEqual(await self.get(), 1)

        self.run_on_loop(main())

    def test_blocks(self):
        async def main():
            connection.tenant = 1
            async with transaction.aatomic():
                self.assertEqual(await self.get(), 1)
                self.assertEqual(await asyncio.create_task(self.get()), 1)
                async with transaction.aatomic():
                    self.assertEqual(await self.get(), 1)
            self.assertEqual(await self.get(), 1)

        self.run_on_loop(main())

    def test_block_of_a_started_task(self):
        async def task():
            async with transaction.aatomic():
                return await self.get()

        async def main():
            connection.tenant = 1
            self.assertEqual(await asyncio.create_task(task()), 1)

        self.run_on_loop(main())

    def test_receivers(self):
        """They share a context, and are siblings all the same."""
        signal = Signal()

        async def receives(number):
            inherited = await self.get()
            connection.tenant = number
            return inherited, await self.get()

        async def first(**kwargs):
            return await receives(2)

        async def second(**kwargs):
            return await receives(3)

        signal.connect(first)
        signal.connect(second)

        async def main():
            connection.tenant = 1
            responses = await signal.asend(None)
            self.assertEqual([found for _, found in responses], [(1, 2), (1, 3)])
            self.assertEqual(await self.get(), 1)
            self.assertEqual(await asyncio.create_task(self.get()), 1)

        self.run_on_loop(main())

    def test_async_to_sync(self):
        """What it runs are siblings, be it on the same loop or on others."""

        async def use(number):
            inherited = await self.get()
            connection.tenant = number
            return inherited, await self.get()

        def call():
            return [async_to_sync(use)(number) for number in (2, 3)]

        self.assertEqual(call(), [(None, 2), (None, 3)])
        self.assertEqual(call(), [(None, 2), (None, 3)])

        async def main():
            connection.tenant = 1
            self.assertEqual(await sync_to_async(call)(), [(1, 2), (1, 3)])
            self.assertEqual(await self.get(), 1)
            self.assertEqual(await asyncio.create_task(self.get()), 1)

        self.run_on_loop(main())

    def test_loops(self):
        async def main(number):
            inherited = await self.get()
            connection.tenant = number
            return inherited, await self.get()

        # As it is if async_to_sync() was called before native mode was used.
        context = contextvars.copy_context()
        for number in (1, 2):
            with asyncio.Runner() as runner:
                found = runner.run(main(number), context=context)
                self.assertEqual(found, (None, number))

    def test_state_is_not_inherited(self):
        async def child():
            return connection.tenant, connection.connection, connection.settings_dict

        async def start():
            return await asyncio.create_task(child())

        def operation():
            connection.tenant = 1
            current_schema()
            self.assertIsNotNone(connection.connection)
            return async_to_sync(start)()

        async def main():
            return await run_sync(operation)

        settings = connections.settings["default"]
        self.assertEqual(self.run_on_loop(main()), (1, None, settings))


class WrappersTests(NativePoolTestCase):
    """Promise 8, for execute wrappers and the log of queries."""

    def counter(self, name):
        def wrapper(execute, *args):
            self.counts[name] = self.counts.get(name, 0) + 1
            return execute(*args)

        return wrapper

    def setUp(self):
        super().setUp()
        self.counts = {}

    def test_execute_wrapper(self):
        async def sibling():
            with connection.execute_wrapper(self.counter("sibling")):
                await run_sync(current_schema)

        async def main():
            with connection.execute_wrapper(self.counter("main")):
                await run_sync(current_schema)
                await asyncio.gather(sibling(), sibling())
                async with transaction.aatomic():
                    await run_sync(current_schema)
            await run_sync(current_schema)
            await asyncio.create_task(run_sync(current_schema))

        self.run_on_loop(main())
        self.assertEqual(self.counts, {"main": 4, "sibling": 2})

    def test_log(self):
        async def main():
            connection.force_debug_cursor = True
            await run_sync(current_schema)
            await asyncio.gather(run_sync(current_schema), run_sync(current_schema))
            self.assertEqual(len(connection.queries), 3)

        self.run_on_loop(main())

    def test_log_of_siblings(self):
        async def sibling():
            connection.force_debug_cursor = True
            await run_sync(current_schema)
            return len(connection.queries)

        async def main():
            return await asyncio.gather(sibling(), sibling())

        self.assertEqual(self.run_on_loop(main()), [1, 1])
