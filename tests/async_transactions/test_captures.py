"""
Promise 16: assertNumQueries() and CaptureQueriesContext see what asynchronous
code does.
"""

import asyncio
import threading
from contextvars import copy_context

from asgiref.sync import async_to_sync, sync_to_async

from django.db import connection, connections, new_connection, transaction
from django.db.backends.signals import connection_created
from django.http import HttpResponse
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import path

from .base import (
    AsyncTransactionTestCase,
    Rollback,
    acreate,
    create,
    create_and_close,
    is_in_memory,
    until,
)
from .models import Entry


async def view(request):
    async with transaction.aatomic():
        await acreate("view")
    return HttpResponse()


urlpatterns = [path("view/", view)]


def verbs(queries):
    """Return what kinds of statements were captured."""
    return [query["sql"].split()[0] for query in queries]


def close():
    connection.close()


def sync_work():
    with transaction.atomic():
        create("a")
        try:
            with transaction.atomic():
                create("b")
                raise Rollback
        except Rollback:
            pass
    Entry.objects.count()


async def async_work():
    async with transaction.aatomic():
        await acreate("a")
        try:
            async with transaction.aatomic():
                await acreate("b")
                raise Rollback
        except Rollback:
            pass
    await Entry.objects.acount()


async def aclear():
    await Entry.objects.all().adelete()


class CaptureTestsMixin:
    """What's captured doesn't depend on the colour of the code."""

    async def test_around_a_transaction(self):
        with CaptureQueriesContext(connection) as expected:
            await sync_to_async(sync_work)()
        await aclear()
        with CaptureQueriesContext(connection) as captured:
            await async_work()
        self.assertEqual(verbs(captured), verbs(expected))
        self.assertIn("SAVEPOINT", verbs(captured))
        await aclear()
        with self.assertNumQueries(len(expected)):
            await async_work()

    def test_around_async_to_sync(self):
        with CaptureQueriesContext(connection) as expected:
            sync_work()
        Entry.objects.all().delete()
        with self.assertNumQueries(len(expected)):
            async_to_sync(async_work)()

    async def test_inside_a_transaction(self):
        async with transaction.aatomic():
            with self.assertNumQueries(1):
                await acreate("a")
            with self.assertNumQueries(3):
                async with transaction.aatomic():
                    await acreate("b")
            await acreate("c")

    async def test_read_inside_a_transaction(self):
        """The captured queries don't depend on where they are looked at."""
        with CaptureQueriesContext(connection) as captured:
            await acreate("a")
            async with transaction.aatomic():
                await acreate("b")
                self.assertEqual(verbs(captured).count("INSERT"), 2)
                self.assertEqual(len(captured), 3)
        self.assertEqual(len(captured), 4)

    async def test_every_way_to_a_thread(self):
        async def by_task():
            await acreate("task")

        with CaptureQueriesContext(connection) as captured:
            async with transaction.aatomic():
                await sync_to_async(create)("sensitive")
                await sync_to_async(create, thread_sensitive=False)("insensitive")
                await asyncio.to_thread(create, "to_thread")
                await asyncio.create_task(by_task())
        self.assertEqual(verbs(captured).count("INSERT"), 4)

    async def test_outside_of_blocks(self):
        with self.assertNumQueries(3):
            await acreate("method")
            await sync_to_async(create)("sensitive")
            await asyncio.to_thread(self.create_in_thread, "to_thread")

    async def test_siblings(self):
        async def block(name):
            async with transaction.aatomic():
                await acreate(name)

        with CaptureQueriesContext(connection) as captured:
            await asyncio.gather(*(block(name) for name in "abc"))
        self.assertEqual(verbs(captured).count("INSERT"), 3)

    async def test_nested_captures(self):
        with self.assertNumQueries(2):
            await acreate("a")
            with self.assertNumQueries(1):
                await acreate("b")

    async def test_task_that_outlives_the_capture(self):
        go_on = asyncio.Event()

        async def outliving():
            await until(go_on)
            async with transaction.aatomic():
                await acreate("late")
                return connection.queries_logged

        with CaptureQueriesContext(connection) as captured:
            task = asyncio.create_task(outliving())
            await acreate("a")
        go_on.set()
        self.assertIs(await task, False)
        self.assertEqual(len(captured), 1)

    async def test_failure(self):
        msg = "2 queries executed, 1 expected\nCaptured queries were:\n1. INSERT"
        with self.assertRaisesMessage(AssertionError, msg):
            with self.assertNumQueries(1):
                await acreate("a")
                await Entry.objects.acount()

    async def test_other_alias(self):
        with self.assertNumQueries(0, using="other"):
            async with transaction.aatomic():
                await acreate("a")
        with self.assertNumQueries(1, using="other"):
            await Entry.objects.using("other").acreate(name="b")

    @override_settings(ROOT_URLCONF=__name__)
    async def test_async_client(self):
        with CaptureQueriesContext(connection) as captured:
            await self.async_client.get("/view/")
            # Sent at the start of each request, it would clear the log.
            await self.async_client.get("/unknown/")
        self.assertEqual(verbs(captured).count("INSERT"), 1)
        self.assertEqual(len(captured), 3)

    @override_settings(ROOT_URLCONF=__name__)
    def test_client(self):
        with self.assertNumQueries(3):
            self.client.get("/view/")


class TestCaseCaptureTests(CaptureTestsMixin, TestCase):
    databases = {"default", "other"}
    # The connection is that of the test.
    create_in_thread = staticmethod(create)


class TransactionTestCaseCaptureTests(CaptureTestsMixin, AsyncTransactionTestCase):
    databases = {"default", "other"}
    create_in_thread = staticmethod(create_and_close)

    async def test_initialization_is_not_captured(self):
        def initialize(connection, **kwargs):
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")

        self.addCleanup(connection_created.disconnect, initialize)
        connection_created.connect(initialize)
        await sync_to_async(close)()
        with self.assertNumQueries(4):
            async with transaction.aatomic():
                await acreate("a")
            await acreate("b")

    async def test_new_connection(self):
        if is_in_memory():
            self.skipTest("An in-memory SQLite database has but one connection.")
        with self.assertNumQueries(1):
            async with new_connection():
                await acreate("async")

    def test_sync_new_connection(self):
        if is_in_memory():
            self.skipTest("An in-memory SQLite database has but one connection.")
        with self.assertNumQueries(1), new_connection():
            create("sync")

    def test_event_loop(self):
        """Without Django's help, it doesn't come back to this thread."""

        async def main():
            await acreate("a")
            await sync_to_async(close)()

        with self.assertNumQueries(1):
            asyncio.run(main())

    def test_sync_code_in_threads(self):
        """As ever, other threads aren't captured by synchronous code."""
        with self.assertNumQueries(1):
            create("here")
            context = copy_context()
            thread = threading.Thread(
                target=context.run, args=(create_and_close, "there")
            )
            thread.start()
            thread.join(10)
        self.assertNames("here", "there")

    def test_nothing_stays_captured(self):
        with self.assertNumQueries(1):
            create("a")
        self.assertIs(connection.queries_logged, False)
        self.assertIs(connections["other"].queries_logged, False)
