import asyncio
import threading
import time

from asgiref.sync import AsyncToSync

from django.db import connection, sharing, transaction
from django.test import TransactionTestCase

from .models import Entry


class Rollback(Exception):
    pass


def is_in_memory():
    return connection.vendor == "sqlite" and connection.is_in_memory_db()


OTHER_SESSIONS = {
    "postgresql": (
        "SELECT state FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'"
    ),
    "mysql": (
        "SELECT COALESCE(trx_state, 'idle') FROM information_schema.PROCESSLIST "
        "LEFT JOIN information_schema.INNODB_TRX ON id = trx_mysql_thread_id "
        "WHERE db = DATABASE() AND id <> CONNECTION_ID()"
    ),
}

SESSION_ID = {
    "postgresql": "SELECT pg_backend_pid()",
    "mysql": "SELECT CONNECTION_ID()",
}

KILL_SESSION = {
    "postgresql": "SELECT pg_terminate_backend(%s)",
    "mysql": "KILL %s",
}

SLOW = {
    "postgresql": "SELECT pg_sleep(20)",
    "mysql": "SELECT SLEEP(20)",
    "sqlite": (
        "WITH RECURSIVE numbers(n) AS "
        "(SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 1000000000) "
        "SELECT max(n) FROM numbers"
    ),
}


def other_sessions():
    """Return the states of the server's other sessions."""
    with connection.cursor() as cursor:
        cursor.execute(OTHER_SESSIONS[connection.vendor])
        return [state for (state,) in cursor.fetchall()]


def session_id():
    """Return what the server calls the session of the current block."""
    with transaction.get_connection().cursor() as cursor:
        cursor.execute(SESSION_ID[connection.vendor])
        return cursor.fetchone()[0]


def kill_session(number):
    with connection.cursor() as cursor:
        cursor.execute(KILL_SESSION[connection.vendor], [number])


def slow_query():
    with transaction.get_connection().cursor() as cursor:
        cursor.execute(SLOW[connection.vendor])
        cursor.fetchall()


def transaction_threads():
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("transaction of")
    ]


def wait_until(condition, timeout=5):
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
        self.assertEqual(connection.execute_wrappers, [])
        self.assertIsNone(getattr(AsyncToSync.executors, "current", None))
        if connection.vendor in OTHER_SESSIONS:
            self.assertIs(
                wait_until(lambda: not self.transactional_sessions()),
                True,
                "A session is left on the server.",
            )

    def transactional_sessions(self):
        # asgiref's shared thread keeps its connection for the process.
        return [state for state in other_sessions() if state != "idle"]

    def assertNames(self, *expected):
        self.assertEqual(
            sorted(Entry.objects.values_list("name", flat=True)), sorted(expected)
        )

    async def assertAsyncNames(self, *expected):
        self.assertEqual(await names(), sorted(expected))


async def until(event):
    """Wait for an event of a test that would hang if it were lost."""
    await asyncio.wait_for(event.wait(), 10)
