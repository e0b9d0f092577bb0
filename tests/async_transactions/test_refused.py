"""
Promise 16: a test case refuses its asynchronous code the databases that it
refuses its synchronous code, also on connections that were opened before.
"""

from asgiref.sync import async_to_sync, sync_to_async

from django.db import connection, connections, new_connection, scopes, transaction
from django.test import SimpleTestCase, TestCase
from django.test.testcases import DatabaseOperationForbidden

from .base import is_in_memory
from .models import Entry


async def exists(using="default"):
    return await Entry.objects.using(using).aexists()


async def iterate(using="default"):
    async for _ in Entry.objects.using(using):
        pass


async def use_cursor(using="default"):
    async with connections[using].acursor() as cursor:
        await cursor.execute("SELECT 1")


async def enter_aatomic(using="default"):
    async with transaction.aatomic(using):
        await exists(using)


async def enter_atomic(using="default"):
    def enter():
        with transaction.atomic(using):
            Entry.objects.using(using).exists()

    await sync_to_async(enter)()


async def begin_by_hand(using="default"):
    await transaction.aset_autocommit(False, using)
    try:
        await exists(using)
    finally:
        await transaction.arollback(using)
        await transaction.aset_autocommit(True, using)


async def enter_new_connection(using="default"):
    async with new_connection(using):
        await exists(using)


WAYS = [
    exists,
    iterate,
    use_cursor,
    enter_atomic,
    enter_new_connection,
    begin_by_hand,
    enter_aatomic,
]


def ways():
    """Return those that there are for the database."""
    if is_in_memory():
        return [way for way in WAYS if way is not enter_new_connection]
    return WAYS


class RefusedMixin:
    using = "default"

    async def test_all(self):
        for way in ways():
            with self.subTest(way.__name__):
                with self.assertRaisesMessage(
                    DatabaseOperationForbidden, f"to '{self.using}' are not allowed in"
                ):
                    await way(self.using)
                self.assertEqual(connections[self.using].blocks, [])


class OpenTests(RefusedMixin, SimpleTestCase):
    """
    Connections are open, as asynchronous tests that are no TransactionTestCase
    leave them. Nothing is refused before and after the test case.
    """

    @classmethod
    def setUpClass(cls):
        cls.addClassCleanup(connections.close_all)
        cls.addClassCleanup(cls.use_all)
        cls.use_all()
        super().setUpClass()

    @classmethod
    def use_all(cls):
        for way in ways():
            async_to_sync(way)()

    def test_kept(self):
        kept = [kept for kept in scopes.idle_connections() if kept.connection]
        is_pooled = bool(connection.settings_dict["OPTIONS"].get("pool"))
        self.assertEqual(len(kept), 0 if is_in_memory() or is_pooled else 1)

    async def test_message(self):
        """It's the one that synchronous code gets."""
        message = (
            "Database queries to 'default' are not allowed in SimpleTestCase "
            "subclasses."
        )
        for way in [exists, enter_aatomic]:
            with self.subTest(way.__name__):
                with self.assertRaisesMessage(DatabaseOperationForbidden, message):
                    await way()


class ClosedTests(RefusedMixin, SimpleTestCase):
    @classmethod
    def setUpClass(cls):
        connections.close_all()
        super().setUpClass()


class OtherTests(RefusedMixin, TestCase):
    """A TestCase refuses the databases that it doesn't list."""

    using = "other"
