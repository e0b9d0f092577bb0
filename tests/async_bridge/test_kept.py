"""
Promise 16: settings that a test overrides reach the connection that its scope
keeps, in native mode.
"""

import asyncio
import unittest

from django.db import connection, connections, run_sync
from django.test import TransactionTestCase, override_settings


def timezone_name():
    connection.ensure_connection()
    return connection.timezone_name


@unittest.skipUnless(connections.native_aliases, "ASYNC_NATIVE is required.")
class OverriddenSettingsTests(TransactionTestCase):
    available_apps = []

    def check(self, between=lambda: None):
        with override_settings(USE_TZ=False, TIME_ZONE="America/Chicago"):
            name = asyncio.run(run_sync(timezone_name))
            self.assertEqual(name, "America/Chicago")
            between()
        with override_settings(USE_TZ=True):
            self.assertEqual(asyncio.run(run_sync(timezone_name)), "UTC")

    def test_open(self):
        self.check()

    def test_closed(self):
        """As TransactionTestCase leaves it."""
        self.check(connections.close_all)
