"""
Promise 16: what a test run does around tests to the connection of its thread,
it does to those of asynchronous code.
"""

from asgiref.sync import async_to_sync, sync_to_async

from django.db import connection, scopes, transaction
from django.test import TransactionTestCase, override_settings

from .base import FreshConnectionsTestCase, acreate, is_native


async def queries():
    """Return those of the connection that asynchronous code uses here."""
    if is_native():
        return connection.queries
    return await sync_to_async(lambda: connection.queries)()


@override_settings(DEBUG=True)
class QueriesLogTests(TransactionTestCase):
    available_apps = ["async_transactions"]

    async def test_queries_log(self):
        self.assertEqual(await queries(), [])
        await acreate("entry")
        self.assertIn("INSERT", (await queries())[-1]["sql"])

    test_queries_log_again = test_queries_log


class DestroyTests(FreshConnectionsTestCase):
    def test_connections_are_closed(self):
        """PostgreSQL drops no database to which a session is open."""

        async def main():
            await acreate("entry")
            async with transaction.aatomic():
                await acreate("in a block")

        async_to_sync(main)()
        kept = [kept for kept in scopes.idle_connections() if kept.connection]
        is_pooled = bool(connection.settings_dict["OPTIONS"].get("pool"))
        self.assertEqual(len(kept), 0 if is_pooled else 1)
        connection.creation.destroy_test_db(keepdb=True, verbosity=0)
        for kept in scopes.idle_connections():
            self.assertIsNone(kept.connection)
        self.assertIsNone(connection.connection)
