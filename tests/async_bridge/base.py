import asyncio
import logging
import time
import unittest
from unittest import mock

from asgiref.sync import sync_to_async

from django.db import connection, connections
from django.test import TransactionTestCase

from .test_waiting import greenlet, psycopg

try:
    import psycopg_pool
except ImportError:
    psycopg_pool = None


@unittest.skipUnless(connection.vendor == "postgresql", "PostgreSQL is required.")
@unittest.skipUnless(greenlet and psycopg, "psycopg 3 and greenlet are required.")
class NativeTestCase(TransactionTestCase):
    """The database is native, and has OPTIONS of the test's own."""

    available_apps = []
    options = {}

    def setUp(self):
        connections.close_all()
        settings = connections.settings["default"]
        self.patch(mock.patch.dict(settings["OPTIONS"], self.options))
        self.patch(mock.patch.dict(settings, ASYNC_NATIVE=True))
        aliases = connections.native_aliases | {"default"}
        self.patch(mock.patch.object(connections, "native_aliases", aliases))
        self.addCleanup(connections.close_all)

    def patch(self, patcher):
        self.addCleanup(patcher.stop)
        return patcher.start()

    def run_on_loop(self, coroutine, timeout=60, **kwargs):
        return asyncio.run(asyncio.wait_for(coroutine, timeout), **kwargs)

    def assertBecomes(self, get, expected):
        """Wait a while for what a function returns to be as expected."""
        deadline = time.monotonic() + 10
        while (found := get()) != expected:
            self.assertLess(time.monotonic(), deadline, found)
            time.sleep(0.01)


class PoolMixin:
    """
    The database has a pool. After each test, all of its connections are back.
    A test may have `pool_options` of its own, as an attribute.
    """

    pool_options = {"min_size": 0, "max_size": 2, "timeout": 10}

    def setUp(self):
        if psycopg_pool is None:
            self.skipTest("psycopg_pool is required.")
        super().setUp()
        self.close_connections()
        method = getattr(self, self._testMethodName)
        pool = getattr(method, "pool_options", self.pool_options)
        patcher = mock.patch.dict(connections.settings["default"]["OPTIONS"], pool=pool)
        patcher.start()
        self.addCleanup(patcher.stop)
        # It reports connections that come back closed.
        logger = logging.getLogger("psycopg.pool")
        self.addCleanup(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        self.addCleanup(connection.close_pool)
        self.addCleanup(self.check_pool)

    def close_connections(self):
        """Close those of this thread, and of the one that asgiref shares."""
        connections.close_all()
        asyncio.run(sync_to_async(connections.close_all)())

    def checked_out(self):
        """Return how many connections are in use or waited for."""
        stats = connection.pool.get_stats()
        waiting = stats.get("requests_waiting", 0)
        return stats["pool_size"] - stats["pool_available"] + waiting

    def check_pool(self):
        self.close_connections()
        deadline = time.monotonic() + 10
        while self.checked_out():
            self.assertLess(time.monotonic(), deadline, connection.pool.get_stats())
            time.sleep(0.01)


class NativePoolTestCase(PoolMixin, NativeTestCase):
    pass
