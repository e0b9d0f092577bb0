"""
Promise 6: connection.execute_wrappers has what it would have in synchronous
code, although statements take turns.
"""

from django.db import connection, transaction

from .base import AsyncTransactionTestCase, acreate


def wrapper(execute, *args):
    return execute(*args)


class ExecuteWrappersTests(AsyncTransactionTestCase):
    async def test_nothing_is_added(self):
        await acreate("outside")
        self.assertEqual(connection.execute_wrappers, [])
        async with transaction.aatomic():
            self.assertEqual(connection.execute_wrappers, [])
            with connection.execute_wrapper(wrapper):
                await acreate("inside")
                self.assertEqual(connection.execute_wrappers, [wrapper])
            self.assertEqual(connection.execute_wrappers, [])
