"""
Promise 17: Every refusal of native mode is clear, and comes at first use.
"""

import asyncio
import subprocess
import sys
import unittest
from unittest import mock

from asgiref.sync import sync_to_async

from django.core.exceptions import ImproperlyConfigured
from django.db import bridge, connection, connections, run_sync, transaction
from django.test import SimpleTestCase, TransactionTestCase

from .test_bridge import greenlet

try:
    import gevent
except ImportError:
    gevent = None

OR_REMEDY = ", or remove it from the settings of the database 'default'."


def query():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


class RefusalTestCase(TransactionTestCase):
    """The database is native, if it can be, or else to be so."""

    available_apps = []

    def setUp(self):
        connections.close_all()
        settings = connections.settings["default"]
        self.patch(mock.patch.dict(settings, ASYNC_NATIVE=True))
        aliases = connections.native_aliases | {"default"}
        self.patch(mock.patch.object(connections, "native_aliases", aliases))

    def patch(self, patcher):
        patcher.start()
        self.addCleanup(patcher.stop)

    async def enter(self):
        async with transaction.aatomic():
            self.fail("It was entered.")

    def check(self, msg, **kwargs):
        async def main():
            for _ in range(2):
                with self.assertRaisesMessage(ImproperlyConfigured, msg):
                    await run_sync(query)
                with self.assertRaisesMessage(ImproperlyConfigured, msg):
                    await self.enter()

        with asyncio.Runner(**kwargs) as runner:
            runner.run(main())

    def check_synchronous(self, msg):
        """Synchronous code is refused as well."""

        def connect():
            # A database in memory doesn't close its own one.
            connection.copy().connect()

        async def main():
            with self.assertRaisesMessage(ImproperlyConfigured, msg):
                await sync_to_async(connect)()

        asyncio.run(main())
        with self.assertRaisesMessage(ImproperlyConfigured, msg):
            connect()


class DriverTests(RefusalTestCase):
    def lacking(self, what):
        return f"ASYNC_NATIVE requires {what}{OR_REMEDY}"

    @unittest.skipUnless(connection.lacks_for_native, "The driver is good enough.")
    def test_backend(self):
        """On other databases, and with psycopg2 or an old psycopg."""
        if connection.vendor == "postgresql":
            version = connection.Database.__version__
            what = f"psycopg version 3.2 or newer; you have {version}. Install that"
        else:
            what = "PostgreSQL. Use that"
        self.check(self.lacking(what))
        self.check_synchronous(self.lacking(what))


@unittest.skipIf(connection.lacks_for_native, "PostgreSQL is required.")
class EnvironmentTests(RefusalTestCase):
    def test_greenlet(self):
        self.patch(mock.patch.object(bridge, "greenlet", None))
        self.patch(mock.patch.dict("sys.modules", {"greenlet": None}))
        self.check(
            "Running synchronous code on the event loop requires greenlet. Install it "
            "with 'python -m pip install greenlet'. Or remove ASYNC_NATIVE from the "
            "settings of the database 'default'."
        )

    @unittest.skipUnless(greenlet, "greenlet is required.")
    def test_loop(self):
        """As asyncio.ProactorEventLoop."""

        class Loop(asyncio.SelectorEventLoop):
            def add_reader(self, *args):
                raise NotImplementedError

            def __repr__(self):
                return "<Loop>"

        self.check(
            "ASYNC_NATIVE requires an event loop that can watch sockets, unlike "
            "<Loop>. Use another one, such as asyncio.SelectorEventLoop" + OR_REMEDY,
            loop_factory=Loop,
        )

    @unittest.skipUnless(greenlet, "greenlet is required.")
    def test_loops(self):
        """Each loop is asked, and once."""
        calls = []

        class Loop(asyncio.SelectorEventLoop):
            def add_reader(self, fd, callback, *args):
                calls.append(fd)
                return super().add_reader(fd, callback, *args)

        async def main():
            for _ in range(2):
                await run_sync(lambda: None)

        for count in (1, 2):
            with asyncio.Runner(loop_factory=Loop) as runner:
                runner.run(main())
            self.assertEqual(len(calls), count)


GEVENT = """
from gevent import monkey
monkey.patch_all()
import asyncio
import django
from django.conf import settings
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": "tests", "ASYNC_NATIVE": True,
}})
django.setup()
from django.core.exceptions import ImproperlyConfigured
from django.db import run_sync
try:
    asyncio.run(run_sync(print, "It was called."))
except ImproperlyConfigured as exc:
    print(exc)
"""


@unittest.skipUnless(gevent, "gevent is required.")
@unittest.skipIf(connection.lacks_for_native, "PostgreSQL is required.")
class GeventTests(SimpleTestCase):
    def test_gevent(self):
        result = subprocess.run(
            [sys.executable, "-c", GEVENT], capture_output=True, text=True, timeout=60
        )
        self.assertEqual(
            result.stdout,
            "ASYNC_NATIVE requires sockets that gevent hasn't patched. Run without "
            f"gevent.monkey{OR_REMEDY}\n",
            result.stderr,
        )
