import asyncio
import threading
import time

from asgiref.sync import AsyncToSync

from django.db import connection, connections, sharing, transaction
from django.test import TransactionTestCase

from . import server
from .models import Entry


class Rollback(Exception):
    pass


def is_in_memory():
    return connection.vendor == "sqlite" and connection.is_in_memory_db()


def is_native():
    return bool(connection.settings_dict.get("ASYNC_NATIVE"))


SLOW = {
    "postgresql": "SELECT pg_sleep(20)",
    "mysql": "SELECT SLEEP(20)",
    "sqlite": (
        "WITH RECURSIVE numbers(n) AS "
        "(SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 1000000000) "
        "SELECT max(n) FROM numbers"
    ),
}


# It ends by itself on SQLite, where it may not be cancelled.
SLOW_WRITE = {
    **SLOW,
    "postgresql": "SELECT 1 FROM pg_sleep(20)",
    "sqlite": SLOW["sqlite"].replace("1000000000", "4000000"),
}


def slow_query():
    with transaction.get_connection().cursor() as cursor:
        cursor.execute(SLOW[connection.vendor])
        cursor.fetchall()


def slow_write():
    sql = (
        f"UPDATE async_transactions_entry SET count = ({SLOW_WRITE[connection.vendor]})"
    )
    with transaction.get_connection().cursor() as cursor:
        cursor.execute(sql)


def transaction_threads():
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("transaction of")
    ]


def wait_until(condition, timeout=15):
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        # InnoDB doesn't bring innodb_trx up to date for who asks more often.
        time.sleep(0.25 if connection.vendor == "mysql" else 0.01)
    return True


async def names():
    return sorted([name async for name in Entry.objects.values_list("name", flat=True)])


def create(name):
    return Entry.objects.create(name=name)


async def acreate(name):
    return await Entry.objects.acreate(name=name)


def create_and_close(name):
    """Do so in a thread that keeps its connection otherwise."""
    try:
        return create(name)
    finally:
        connection.close()


class AsyncTransactionTestCase(TransactionTestCase):
    """
    Check after each test that nothing is left of its transactions: no thread,
    no session on the server, no block, no lent connection.
    """

    available_apps = ["async_transactions"]

    def setUp(self):
        if connection.vendor == "mysql":
            # InnoDB keeps deleted rows for a while, and whoever inserts the
            # same unique value waits for a lock on the row next to it.
            with connection.constraint_checks_disabled():
                with connection.cursor() as cursor:
                    cursor.execute(f"TRUNCATE TABLE {Entry._meta.db_table}")
        timeout = sharing.TURN_TIMEOUT
        self.addCleanup(setattr, sharing, "TURN_TIMEOUT", timeout)
        sharing.TURN_TIMEOUT = 10
        self.addCleanup(self.check_nothing_is_left)

    def check_nothing_is_left(self):
        self.assertIs(wait_until(lambda: not transaction_threads()), True)
        self.assertEqual(connection.blocks, [])
        self.assertIsNone(connection.turn)
        self.assertIsNone(connection.lent_by)
        self.assertIsNone(getattr(AsyncToSync.executors, "current", None))
        if server.is_supported():
            # asgiref's shared thread keeps its connection for the process.
            self.assertIs(
                wait_until(lambda: not server.run(connection, server.BUSY_SESSIONS)),
                True,
                "A session is left on the server.",
            )

    def assertNames(self, *expected):
        self.assertEqual(
            sorted(Entry.objects.values_list("name", flat=True)), sorted(expected)
        )

    async def assertAsyncNames(self, *expected):
        self.assertEqual(await names(), sorted(expected))


class FreshConnectionsTestCase(AsyncTransactionTestCase):
    """Share no connection with the tests before and after."""

    def setUp(self):
        super().setUp()
        if is_in_memory():
            self.skipTest("An in-memory database has but one connection.")
        connections.close_all()

    def tearDown(self):
        connections.close_all()


async def until(event):
    """Wait for an event, or at a barrier, but not if it never comes."""
    await asyncio.wait_for(event.wait(), 10)
