import asyncio
import logging
from unittest import mock

from asgiref.sync import sync_to_async

from django.db import connection, connections

from .base import AsyncTransactionTestCase, wait_until


def close_connections():
    """Close those of this thread, and of the one that asgiref shares."""
    connections.close_all()
    asyncio.run(sync_to_async(connections.close_all)())


class PoolTestCase(AsyncTransactionTestCase):
    """
    Give the database a pool, and check after each test that all of its
    connections are back.
    """

    pool_options = {"min_size": 0, "max_size": 2, "timeout": 1}

    def setUp(self):
        super().setUp()
        if connection.vendor != "postgresql":
            self.skipTest("Needs PostgreSQL.")
        try:
            import psycopg_pool  # NOQA: F401
        except ImportError:
            self.skipTest("Needs psycopg_pool.")
        close_connections()
        options = connections.settings["default"]["OPTIONS"]
        patcher = mock.patch.dict(options, pool=self.pool_options)
        patcher.start()
        self.addCleanup(patcher.stop)
        # It reports connections that come back closed.
        logger = logging.getLogger("psycopg.pool")
        self.addCleanup(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        self.addCleanup(connection.close_pool)
        self.addCleanup(close_connections)
        self.addCleanup(self.check_pool_is_full)

    def checked_out(self):
        """Return the number of connections that somebody has or waits for."""
        stats = connection.pool.get_stats()
        waiting = stats.get("requests_waiting", 0)
        return stats["pool_size"] - stats["pool_available"] + waiting

    def check_pool_is_full(self):
        close_connections()
        if not wait_until(lambda: not self.checked_out()):
            self.fail(f"Connections are out of the pool: {connection.pool.get_stats()}")
