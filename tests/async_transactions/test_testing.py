"""
Promise 16: TestCase rolls back what asynchronous tests write, mixed with
synchronous fixtures, AsyncClient, sync_to_async() and aatomic().
"""

import asyncio
import unittest
from urllib.error import HTTPError
from urllib.request import urlopen

from asgiref.sync import async_to_sync, sync_to_async

from django.core import serializers
from django.db import IntegrityError, connection, connections, transaction
from django.db.transaction import TransactionManagementError
from django.http import HttpResponse
from django.test import (
    AsyncRequestFactory,
    LiveServerTestCase,
    RequestFactory,
    TestCase,
    TransactionTestCase,
    override_settings,
)
from django.urls import path

from .base import AsyncTransactionTestCase, Rollback, acreate, create, names, until
from .models import Entry


def session():
    """Return the driver's connection that synchronous code uses here."""
    connection.ensure_connection()
    return connection.connection


async def writes(request):
    await acreate("view")
    async with transaction.aatomic():
        await acreate("block")
    return HttpResponse(f"{connection.in_atomic_block}")


async def fails(request):
    async with transaction.aatomic():
        await acreate("kept")
    async with transaction.aatomic():
        await acreate("rolled back")
        raise Rollback


async def reads(request):
    return HttpResponse(", ".join(await names()))


urlpatterns = [
    path("writes/", writes),
    path("fails/", fails),
    path("reads/", reads),
]


class AtomicRequests:
    """Set ATOMIC_REQUESTS."""

    def setUp(self):
        super().setUp()
        settings = connection.settings_dict
        self.addCleanup(settings.__setitem__, "ATOMIC_REQUESTS", False)
        settings["ATOMIC_REQUESTS"] = True


class AsyncTestCaseTests(TestCase):
    """All that's written is written in the test's transaction."""

    databases = {"default", "other"}

    @classmethod
    def setUpTestData(cls):
        cls.entry = create("class")
        async_to_sync(acreate)("async class")

    def setUp(self):
        create("setUp")
        async_to_sync(acreate)("async setUp")

    fixtures_names = ["async class", "async setUp", "class", "setUp"]

    async def assertNamesAre(self, *expected):
        self.assertEqual(await names(), sorted([*self.fixtures_names, *expected]))

    async def test_fixtures(self):
        self.assertEqual(self.entry.name, "class")
        self.assertEqual(await Entry.objects.aget(name="class"), self.entry)
        self.assertIsNot(await Entry.objects.aget(name="class"), self.entry)
        await self.assertNamesAre()

    async def test_test_data_is_isolated(self):
        self.entry.name = "changed"
        await self.entry.asave()
        self.assertIs(await Entry.objects.filter(name="class").aexists(), False)

    test_test_data_is_isolated_again = test_test_data_is_isolated

    async def test_connections(self):
        """Every way to synchronous code is a way to the test's connection."""
        sessions = {
            "sensitive": await sync_to_async(session)(),
            "insensitive": await sync_to_async(session, thread_sensitive=False)(),
            "to_thread": await asyncio.to_thread(session),
            "task": await asyncio.create_task(sync_to_async(session)()),
        }
        async with transaction.aatomic():
            sessions["block"] = await sync_to_async(session)()
            sessions["block, to_thread"] = await asyncio.to_thread(session)
        expected = connection.connection
        self.assertIsNotNone(expected)
        for name, actual in sessions.items():
            with self.subTest(name):
                self.assertIs(actual, expected)

    async def test_writes(self):
        await acreate("method")
        await sync_to_async(create)("sensitive")
        await sync_to_async(create, thread_sensitive=False)("insensitive")
        await asyncio.to_thread(create, "to_thread")
        async with asyncio.TaskGroup() as group:
            group.create_task(acreate("task"))
        async with transaction.aatomic():
            await acreate("block")
            await asyncio.to_thread(create, "block, to_thread")
        async with transaction.aatomic(using="other"):
            await Entry.objects.using("other").acreate(name="other")
        await self.assertNamesAre(
            "method",
            "sensitive",
            "insensitive",
            "to_thread",
            "task",
            "block",
            "block, to_thread",
        )
        self.assertEqual(await Entry.objects.using("other").acount(), 1)

    async def test_nothing_of_other_tests(self):
        await self.assertNamesAre()
        self.assertEqual(await Entry.objects.using("other").acount(), 0)

    test_writes_again = test_writes

    async def test_rollback(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await acreate("rolled back")
                await sync_to_async(create)("rolled back, too")
                raise Rollback
        await self.assertNamesAre()

    async def test_database_error(self):
        with self.assertRaises(IntegrityError):
            async with transaction.aatomic():
                await acreate("class")
        await acreate("usable")
        await self.assertNamesAre("usable")

    async def test_durable(self):
        """As for atomic(), the blocks of the test don't count."""
        async with transaction.aatomic(durable=True):
            await acreate("durable")
            with self.assertRaisesMessage(RuntimeError, "durable"):
                async with transaction.aatomic(durable=True):
                    self.fail("It was entered.")
        await self.assertNamesAre("durable")

    def test_sync_test_of_async_code(self):
        async def main():
            async with transaction.aatomic():
                await acreate("main")

        with self.assertRaises(Rollback):
            with transaction.atomic():
                async_to_sync(main)()
                raise Rollback
        self.assertIs(Entry.objects.filter(name="main").exists(), False)
        asyncio.run(main())
        self.assertIs(Entry.objects.filter(name="main").exists(), True)


@override_settings(ROOT_URLCONF=__name__)
class ClientTests(TestCase):
    """What views write is written in the test's transaction."""

    @classmethod
    def setUpTestData(cls):
        create("class")

    written = [b"block", b"class", b"view"]

    async def test_async_client(self):
        response = await self.async_client.get("/writes/")
        self.assertEqual(response.content, b"True")
        response = await self.async_client.get("/reads/")
        self.assertEqual(response.content.split(b", "), self.written)

    def test_client(self):
        self.assertEqual(self.client.get("/writes/").content, b"True")
        response = self.client.get("/reads/")
        self.assertEqual(response.content.split(b", "), self.written)

    async def test_client_in_async_code(self):
        response = await sync_to_async(self.client.get)("/writes/")
        self.assertEqual(response.content, b"True")
        response = await self.async_client.get("/reads/")
        self.assertEqual(response.content.split(b", "), self.written)

    async def test_request_factories(self):
        for factory in (RequestFactory(), AsyncRequestFactory()):
            with self.subTest(factory=factory):
                response = await reads(factory.get("/"))
                self.assertEqual(response.content, b"class")
                with self.assertRaises(Rollback):
                    async with transaction.aatomic():
                        await writes(factory.get("/"))
                        self.assertEqual(await Entry.objects.acount(), 3)
                        raise Rollback

    async def test_concurrent_requests(self):
        """Those that succeed are unharmed by those that fail."""

        async def add(request):
            name = request.GET["name"]
            async with transaction.aatomic():
                await acreate(name)
                if name.startswith("bad"):
                    raise Rollback
            return HttpResponse()

        urls = type("urls", (), {"urlpatterns": [path("", add)]})
        with override_settings(ROOT_URLCONF=urls):
            await asyncio.gather(
                *(
                    self.async_client.get("/", {"name": name})
                    for name in ("a", "bad 1", "b", "bad 2", "c")
                ),
                return_exceptions=True,
            )
        self.assertEqual(await names(), ["a", "b", "c", "class"])

    async def test_failing_view(self):
        with self.assertRaises(Rollback):
            await self.async_client.get("/fails/")
        self.assertEqual(await names(), ["class", "kept"])


class AtomicRequestsClientTests(AtomicRequests, ClientTests):
    """The same with ATOMIC_REQUESTS, but a failing view keeps nothing."""

    async def test_failing_view(self):
        with self.assertRaises(Rollback):
            await self.async_client.get("/fails/")
        self.assertEqual(await names(), ["class"])


def run_tests(cls):
    """Run the tests of a class. Raise what the first of them raised."""
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(cls)
    result = unittest.TestResult()
    suite.run(result)
    for _, traceback in result.errors + result.failures:
        raise AssertionError(traceback)
    return result.testsRun


class LeavesNothingTests(AsyncTransactionTestCase):
    """Classes of tests, seen from outside."""

    def test_testcase(self):
        class Tests(TestCase):
            available_apps = ["async_transactions"]

            @classmethod
            def setUpTestData(cls):
                create("class")
                async_to_sync(acreate)("async class")

            async def asynchronous(self):
                self.assertEqual(await names(), ["async class", "before", "class"])
                await acreate("a")
                async with transaction.aatomic():
                    await acreate("b")
                await sync_to_async(create, thread_sensitive=False)("c")
                await asyncio.to_thread(create, "d")

            def synchronous(self):
                async_to_sync(self.asynchronous)()

            async def task_that_outlives_the_test(self):
                written = asyncio.Event()

                async def outlive():
                    async with transaction.aatomic():
                        await acreate("e")
                        written.set()
                        await asyncio.Event().wait()

                self.task = asyncio.create_task(outlive())
                await until(written)

            test_1 = test_2 = asynchronous
            test_3 = synchronous
            test_4 = task_that_outlives_the_test
            test_5 = asynchronous

        create("before")
        self.assertEqual(run_tests(Tests), 5)
        self.assertNames("before")

    def test_task_that_outlives_a_block(self):
        class Tests(TestCase):
            async def test_a_block_of_its_own(self):
                over = asyncio.Event()

                async def late():
                    await until(over)
                    async with transaction.aatomic():
                        seen.append(await names())
                        await acreate("late")
                    with self.assertRaises(TransactionManagementError):
                        await acreate("later")

                await acreate("test")
                async with transaction.aatomic():
                    task = asyncio.create_task(late())
                    await acreate("block")
                over.set()
                await task
                seen.append(await names())

        seen = []
        self.assertEqual(run_tests(Tests), 1)
        self.assertEqual(seen, [["block", "test"], ["block", "late", "test"]])
        self.assertNames()

    def test_transactiontestcase(self):
        class Tests(TransactionTestCase):
            available_apps = ["async_transactions"]

            async def asynchronous(self):
                self.assertEqual(await names(), [])
                await acreate("a")
                async with transaction.aatomic():
                    await acreate("b")

            test_1 = test_2 = asynchronous

        self.assertEqual(run_tests(Tests), 2)
        self.assertNames()

    def test_serialized_rollback(self):
        class Tests(TransactionTestCase):
            available_apps = ["async_transactions"]
            serialized_rollback = True

            async def asynchronous(self):
                self.assertEqual(await names(), ["serialized"])
                async with transaction.aatomic():
                    await Entry.objects.all().adelete()
                    await acreate("new")
                await acreate("newer")

            test_1 = test_2 = asynchronous

        contents = serializers.serialize("json", [Entry(name="serialized")])
        database = connections["default"]
        missing = object()
        kept = getattr(database, "_test_serialized_contents", missing)
        database._test_serialized_contents = contents
        try:
            self.assertEqual(run_tests(Tests), 2)
        finally:
            if kept is missing:
                del database._test_serialized_contents
            else:
                database._test_serialized_contents = kept


class LiveServerTestsMixin:
    """A server's threads use connections that aren't those of the test."""

    available_apps = ["async_transactions"]

    def get(self, path):
        try:
            with urlopen(self.live_server_url + path, timeout=10) as response:
                return response.read().decode()
        except HTTPError as error:
            with error:
                return error.code

    def test_view(self):
        create("test")
        self.assertEqual(self.get("/writes/"), self.in_atomic_block)
        self.assertEqual(self.get("/reads/"), "block, test, view")
        self.assertEqual(Entry.objects.count(), 3)

    async def test_view_from_async_test(self):
        async with transaction.aatomic():
            await acreate("test")
        self.assertEqual(
            await asyncio.to_thread(self.get, "/writes/"), self.in_atomic_block
        )
        self.assertEqual(await names(), ["block", "test", "view"])

    def test_failing_view(self):
        with self.assertLogs("django.request", "ERROR"):
            self.assertEqual(self.get("/fails/"), 500)
        self.assertEqual(self.get("/reads/"), self.kept)

    async def test_concurrent_transactions(self):
        """The test and the server wait for each other's transactions."""
        numbers = range(20)

        async def block():
            for number in numbers:
                async with transaction.aatomic():
                    await acreate(f"test {number}")

        def get():
            # One by one: in memory, the server's threads share a connection,
            # and sqlite3 doesn't support that they use it at once.
            return [self.get("/reads/") for _ in numbers]

        _, responses = await asyncio.gather(block(), asyncio.to_thread(get))
        self.assertNotIn(500, responses)
        self.assertEqual(await Entry.objects.acount(), len(numbers))


@override_settings(ROOT_URLCONF=__name__)
class LiveServerTests(LiveServerTestsMixin, LiveServerTestCase):
    in_atomic_block = "False"
    kept = "kept"


@override_settings(ROOT_URLCONF=__name__)
class AtomicRequestsLiveServerTests(
    AtomicRequests, LiveServerTestsMixin, LiveServerTestCase
):
    in_atomic_block = "True"
    kept = ""
