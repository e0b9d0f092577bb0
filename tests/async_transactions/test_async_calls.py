"""
Promise 3: asynchronous methods wait for their turn on the event loop, and not
in the thread that a nested block may need.
"""

import asyncio
import threading

from asgiref.sync import async_to_sync

from django.core.paginator import AsyncPaginator
from django.db import transaction
from django.db.async_calls import sync_to_async

from .base import AsyncTransactionTestCase, Rollback, acreate, create, is_native, until
from .models import Entry


class WaitingTests(AsyncTransactionTestCase):
    """Below a synchronous block, in whose thread a nested one is open."""

    async def main(self, *functions):
        entered = asyncio.Event()
        waiting = asyncio.Event()

        async def nested():
            atomic = transaction.atomic()
            await sync_to_async(atomic.__enter__)()
            try:
                await acreate("rolled back")
                entered.set()
                await until(waiting)
                await acreate("rolled back, too")
            finally:
                await sync_to_async(atomic.__exit__)(Rollback, Rollback(), None)

        # Another thread takes part, so turns are taken from here on.
        await asyncio.to_thread(create, "before")
        task = asyncio.create_task(nested())
        await until(entered)
        # It goes on when the functions have begun to wait.
        asyncio.get_running_loop().call_later(0.1, waiting.set)
        try:
            return await asyncio.gather(*(function() for function in functions))
        finally:
            waiting.set()
            await task

    def run_with_nested(self, *functions):
        with transaction.atomic():
            return async_to_sync(self.main)(*functions)

    def test_methods(self):
        async def iterate():
            return [entry.name async for entry in Entry.objects.order_by("name")]

        async def refresh():
            entry = Entry(name="before")
            entry.pk = (await Entry.objects.aget(name="before")).pk
            await entry.arefresh_from_db()
            return entry.name

        async def paginate():
            return await AsyncPaginator(Entry.objects.order_by("name"), 10).acount()

        results = self.run_with_nested(
            iterate, refresh, paginate, Entry.objects.aexists
        )
        self.assertEqual(results, [["before"], "before", 1, True])

    def test_writes(self):
        self.run_with_nested(lambda: acreate("a"), lambda: acreate("b"))
        self.assertNames("a", "b", "before")


class CallTests(AsyncTransactionTestCase):
    def test_outside_of_blocks(self):
        """It's asgiref's function, but in native mode."""
        if is_native():
            self.skipTest("It's called on the event loop's thread.")
        call = sync_to_async(threading.current_thread)

        async def main():
            return await call()

        self.assertIs(async_to_sync(main)(), threading.current_thread())
