"""
Promises 11, 14 and 17: native mode uses no thread, and every refusal is clear.
"""

import threading
import unittest
from unittest import mock

from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import bridge, connection, connections, native, run_sync
from django.test import TransactionTestCase

from .test_bridge import BridgeTestCase, greenlet


class RefusalTests(BridgeTestCase):
    databases = ["default"]

    def test_greenlet_is_missing(self):
        with (
            mock.patch.object(bridge, "greenlet", None),
            mock.patch.dict("sys.modules", {"greenlet": None}),
            self.assertRaisesMessage(ImproperlyConfigured, "the database 'default'"),
        ):
            native.check("default")

    def test_other_backend(self):
        other = connection.copy("other backend")
        other.settings_dict["ASYNC_NATIVE"] = True
        with (
            mock.patch.object(type(other), "is_native", False),
            self.assertRaisesMessage(
                ImproperlyConfigured, "ASYNC_NATIVE requires PostgreSQL."
            ),
        ):
            other.connect()

    @unittest.skipUnless(greenlet, "greenlet is required.")
    def test_alias_that_is_not_native(self):
        stray = connection.copy("stray")
        stray.settings_dict["ASYNC_NATIVE"] = False
        msg = "The database 'stray' can't be used here"
        with self.assertRaisesMessage(SynchronousOnlyOperation, msg):
            self.run_on_loop(bridge.run(stray.cursor))

    def test_coroutine_function(self):
        async def coroutine_function():
            pass

        with self.assertRaisesMessage(TypeError, "Await it instead."):
            self.run_on_loop(run_sync(coroutine_function))


def query():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return cursor.fetchone(), threading.get_ident()


class RunSyncTests(TransactionTestCase):
    available_apps = []

    async def test_thread(self):
        """It's the loop's own in native mode, and another one otherwise."""
        result, ident = await run_sync(query)
        self.assertEqual(result, (1,))
        is_native = "default" in connections.native_aliases
        self.assertIs(ident == threading.get_ident(), is_native)
