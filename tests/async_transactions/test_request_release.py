"""
Promise 15: what a request has opened is released at its end, on every path out
of the ASGI handler.

Here they are taken one by one, in this process. test_servers.py has those that
servers take.
"""

import asyncio
import contextvars

from asgiref.testing import ApplicationCommunicator

from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished, request_started
from django.db import connections
from django.db.backends.signals import connection_created
from django.db.transaction import aatomic
from django.http import HttpResponse, StreamingHttpResponse
from django.test import AsyncRequestFactory, override_settings
from django.urls import path

from .base import AsyncTransactionTestCase, Rollback, is_in_memory, until
from .models import Entry

ALIASES = ["default", "other"]


class Request:
    """What a test and the view that it requests tell each other."""

    def __init__(self):
        self.started = asyncio.Event()
        self.resumed = asyncio.Event()
        self.task = None


# The one that's being made.
current = None


async def use_connections():
    """Open one for autocommit and one for a block on each database."""
    for alias in ALIASES:
        await Entry.objects.using(alias).acount()
        async with aatomic(alias):
            await Entry.objects.using(alias).aget_or_create(name="committed")


async def succeeds(request):
    await use_connections()
    return HttpResponse()


async def fails(request):
    await use_connections()
    raise Rollback


async def only_reads(request):
    for alias in ALIASES:
        await Entry.objects.using(alias).acount()
    return HttpResponse()


async def waits(request):
    await use_connections()
    async with aatomic(), aatomic("other"):
        await Entry.objects.acreate(name="rolled back")
        current.started.set()
        await until(current.resumed)
    return HttpResponse()


async def ignores_cancellation(request):
    try:
        await waits(request)
    except asyncio.CancelledError:
        await use_connections_again()
    return HttpResponse()


async def use_connections_again():
    for alias in ALIASES:
        async with aatomic(alias):
            await Entry.objects.using(alias).aupdate(count=1)
        await Entry.objects.using(alias).acount()


async def streams(request):
    async def content():
        await use_connections()
        async with aatomic(), aatomic("other"):
            await Entry.objects.acreate(name="rolled back")
            yield "first"
            current.started.set()
            await until(current.resumed)

    return StreamingHttpResponse(content())


async def fails_streaming(request):
    async def content():
        await use_connections()
        async with aatomic(), aatomic("other"):
            await Entry.objects.acreate(name="rolled back")
            yield "first"
            raise Rollback

    return StreamingHttpResponse(content())


async def starts_task(request):
    async def work():
        await until(current.resumed)
        await use_connections_again()
        return "finished"

    await use_connections()
    current.task = asyncio.create_task(work())
    return HttpResponse()


async def starts_task_in_a_block(request):
    async def work():
        async with aatomic():
            await Entry.objects.acreate(name="rolled back")
            current.started.set()
            await until(current.resumed)
            await Entry.objects.filter(name="rolled back").aupdate(name="task")

    await use_connections()
    current.task = asyncio.create_task(work())
    await until(current.started)
    return HttpResponse()


urlpatterns = [
    path(f"{view.__name__}/", view)
    for view in [
        fails,
        fails_streaming,
        ignores_cancellation,
        only_reads,
        starts_task,
        starts_task_in_a_block,
        streams,
        succeeds,
        waits,
    ]
]


def sync_middleware(get_response):
    def middleware(request):
        for alias in ALIASES:
            Entry.objects.using(alias).count()
        return get_response(request)

    return middleware


@override_settings(ROOT_URLCONF=__name__)
class ReleaseTests(AsyncTransactionTestCase):
    """
    The tests are synchronous: in a test that's a coroutine function,
    synchronous code of the request would use the test's connection.
    """

    databases = {"default", "other"}
    max_age = 0

    def setUp(self):
        super().setUp()
        if is_in_memory():
            self.skipTest("Connections to a database in memory aren't closed.")
        for alias in ALIASES:
            settings = connections[alias].settings_dict
            self.addCleanup(
                settings.__setitem__, "CONN_MAX_AGE", settings["CONN_MAX_AGE"]
            )
            settings["CONN_MAX_AGE"] = self.max_age
        self.opened = []
        self.finished = []
        self.connect(connection_created, self.note_opened)
        self.connect(request_finished, self.note_finished)

    def connect(self, signal, receiver):
        signal.connect(receiver)
        self.addCleanup(signal.disconnect, receiver)

    def note_opened(self, connection, **kwargs):
        self.opened.append(connection)

    def note_finished(self, **kwargs):
        self.finished.append(True)

    def run_request(self, view, talk):
        """Call the handler, have `talk()` talk to it, and check the end."""

        async def run():
            global current
            current = Request()
            scope = AsyncRequestFactory()._base_scope(path=f"/{view}/")
            application = ASGIHandler()
            communicator = ApplicationCommunicator(application, scope)
            try:
                await talk(communicator)
            finally:
                communicator.stop(exceptions=False)
            await self.assertReleased()

        # Servers don't call the application in a context that has been used.
        contextvars.Context().run(asyncio.run, run())

    async def assertReleased(self):
        """
        Everything is closed when the handler has returned, or soon, if the
        event loop has to finalize an asynchronous generator.
        """
        opened = {connection.alias for connection in self.opened}
        self.assertEqual(opened, set(ALIASES))
        for _ in range(20):
            if not (left := [conn for conn in self.opened if conn.connection]):
                return
            await asyncio.sleep(0.1)
        message = f"The request has left {left}."
        for connection in left:
            # They would stop the next test.
            connection.connection.close()
        self.fail(message)

    async def receive_start(self, communicator, status=200):
        await communicator.send_input({"type": "http.request"})
        message = await communicator.receive_output(10)
        self.assertEqual(message["type"], "http.response.start")
        self.assertEqual(message["status"], status)

    async def receive_all(self, communicator, status=200):
        await self.receive_start(communicator, status)
        while True:
            message = await communicator.receive_output(10)
            if not message.get("more_body", False):
                break
        await communicator.wait(10)

    def assertStored(self, *names):
        for alias in ALIASES:
            stored = Entry.objects.using(alias).values_list("name", flat=True)
            self.assertEqual(sorted(stored), sorted(names))

    def test_response(self):
        self.run_request("succeeds", self.receive_all)
        self.assertStored("committed")
        self.assertEqual(len(self.finished), 1)

    @override_settings(MIDDLEWARE=[f"{__name__}.sync_middleware"])
    def test_sync_middleware(self):
        self.run_request("succeeds", self.receive_all)
        self.assertStored("committed")

    def test_exception(self):
        async def talk(communicator):
            await self.receive_all(communicator, status=500)

        self.run_request("fails", talk)
        self.assertStored("committed")
        self.assertEqual(len(self.finished), 1)

    def test_exception_while_streaming(self):
        async def talk(communicator):
            await self.receive_start(communicator)
            # receive_output() would wait for more, and tell only then.
            await asyncio.wait([communicator.future], timeout=10)
            with self.assertRaises(Rollback):
                await communicator.receive_output(10)

        self.run_request("fails_streaming", talk)
        self.assertStored("committed")

    def check_disconnect(self, view):
        async def talk(communicator):
            await communicator.send_input({"type": "http.request"})
            await until(current.started)
            await communicator.send_input({"type": "http.disconnect"})
            await communicator.wait(10)

        self.run_request(view, talk)
        self.assertStored("committed")

    def test_disconnect(self):
        self.check_disconnect("waits")
        self.assertEqual(len(self.finished), 1)

    @override_settings(MIDDLEWARE=[f"{__name__}.sync_middleware"])
    def test_disconnect_with_sync_middleware(self):
        self.check_disconnect("waits")

    def test_disconnect_while_streaming(self):
        self.check_disconnect("streams")

    def test_disconnect_that_is_ignored(self):
        """The view goes on after the CancelledError."""
        self.check_disconnect("ignores_cancellation")

    def check_cancellation(self, view):
        async def talk(communicator):
            await communicator.send_input({"type": "http.request"})
            await until(current.started)
            communicator.future.cancel()
            await asyncio.wait([communicator.future], timeout=10)
            self.assertIs(communicator.future.cancelled(), True)

        self.run_request(view, talk)
        self.assertStored("committed")

    def test_cancelled_by_the_server(self):
        """As daphne does when a request takes too long to end."""
        self.check_cancellation("waits")

    def test_cancelled_by_the_server_while_streaming(self):
        self.check_cancellation("streams")

    def check_send_fails(self, view, count):
        """Let send() raise, as it may after a disconnect."""

        async def talk(communicator):
            sent = []

            async def receive():
                if not received:
                    received.append(True)
                    return {"type": "http.request"}
                await asyncio.Event().wait()

            async def send(message):
                sent.append(message)
                if len(sent) > count:
                    raise OSError

            received = []
            scope = AsyncRequestFactory()._base_scope(path=f"/{view}/")
            with self.assertRaises(OSError):
                await asyncio.wait_for(ASGIHandler()(scope, receive, send), 10)

        self.run_request(view, talk)
        self.assertStored("committed")

    def test_send_fails(self):
        self.check_send_fails("succeeds", 0)

    def test_send_fails_while_streaming(self):
        self.check_send_fails("streams", 1)

    def test_request_started_fails(self):
        """After a receiver has used a connection."""

        async def use_and_fail(**kwargs):
            await use_connections()
            raise Rollback

        async def talk(communicator):
            await communicator.send_input({"type": "http.request"})
            await asyncio.wait([communicator.future], timeout=10)
            with self.assertRaises(Rollback):
                await communicator.receive_output(10)

        self.connect(request_started, use_and_fail)
        self.run_request("succeeds", talk)
        self.assertStored("committed")

    def test_request_finished_uses_connections(self):
        """What receivers open is released after them."""

        def use(**kwargs):
            for alias in ALIASES:
                Entry.objects.using(alias).update(count=1)

        self.connect(request_finished, use)
        self.run_request("succeeds", self.receive_all)
        self.assertStored("committed")

    def test_task_outlives_the_request(self):
        """The request's connections don't wait for it, nor does it fail."""

        async def talk(communicator):
            await self.receive_all(communicator)
            await self.assertReleased()
            self.opened.clear()
            current.resumed.set()
            self.assertEqual(await asyncio.wait_for(current.task, 10), "finished")
            # Its context holds what it has used.
            current.task = None

        self.run_request("starts_task", talk)
        self.assertStored("committed")

    def test_block_outlives_the_request(self):
        """A task that goes on in a block commits it."""

        async def talk(communicator):
            await self.receive_all(communicator)
            current.resumed.set()
            await asyncio.wait_for(current.task, 10)

        self.run_request("starts_task_in_a_block", talk)
        names = Entry.objects.values_list("name", flat=True)
        self.assertEqual(sorted(names), ["committed", "task"])

    def test_concurrent_requests(self):
        """Each releases its own. (SQLite has one writer at a time.)"""

        async def talk(communicator):
            other = ApplicationCommunicator(
                ASGIHandler(), AsyncRequestFactory()._base_scope(path="/only_reads/")
            )
            await communicator.send_input({"type": "http.request"})
            await until(current.started)
            await self.receive_all(other)
            current.resumed.set()
            await communicator.receive_output(10)
            await communicator.wait(10)

        self.run_request("waits", talk)


class PersistentReleaseTests(ReleaseTests):
    """
    The thread of a request ends with it. Nobody could use a connection that
    persisted in there.
    """

    max_age = None
