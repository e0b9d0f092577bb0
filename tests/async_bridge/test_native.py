"""
Promises 11, 14 and 17: native mode uses no thread, and every refusal is clear.
"""

import threading
import unittest

from django.contrib.sites.models import Site
from django.core.exceptions import SynchronousOnlyOperation
from django.db import bridge, connection, connections, run_sync
from django.test import TransactionTestCase
from django.test.utils import isolate_apps

from .test_bridge import BridgeTestCase, greenlet
from .test_bridge_debug import DebugMixin, position


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


class DebugTests(DebugMixin, BridgeTestCase, TransactionTestCase):
    available_apps = ["django.contrib.sites"]

    @isolate_apps("async_bridge")
    def test_save(self):
        """A helper of a model's save() is named."""
        if "default" not in connections.native_aliases:
            self.skipTest("ASYNC_NATIVE is required.")

        def slugify(site):
            self.blocker.block()

        class Shop(Site):
            class Meta:
                app_label = "async_bridge"
                proxy = True

            def save(self, *args, **kwargs):
                slugify(self)
                super().save(*args, **kwargs)

        async def main():
            shop = await Shop.objects.acreate(domain="shop.example.com", name="Shop")
            return await Shop.objects.aget(pk=shop.pk)

        with self.assertWarnings(
            f"{position(Shop.save, 1)}    slugify(self)\n{position(slugify, 1)}"
        ):
            shop = self.run_on_loop(main(), debug=True)
        self.assertEqual(shop.name, "Shop")
