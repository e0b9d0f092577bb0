"""
Promises 11, 14 and 17: native mode uses no thread, and every refusal is clear.
"""

import threading
import unittest

from django.core.exceptions import SynchronousOnlyOperation
from django.db import bridge, connection, connections, run_sync
from django.test import TransactionTestCase

from .test_bridge import BridgeTestCase, greenlet


class RefusalTests(BridgeTestCase):
    databases = ["default"]

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
