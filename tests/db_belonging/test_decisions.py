"""
The decision table of django.db.belonging, row by row, and with real threads
and event loops.
"""

import asyncio
import contextvars
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from asgiref.sync import (
    SyncToAsync,
    ThreadSensitiveContext,
    async_to_sync,
    sync_to_async,
)

from django.core.exceptions import SynchronousOnlyOperation
from django.db import belonging, connection, connections, transaction
from django.test import SimpleTestCase, TransactionTestCase

from .models import Item


def unused():
    raise AssertionError("It costs too much to be asked here.")


class DecisionTableTests(SimpleTestCase):
    # strict, ended, same_thread, moved, runs_loop, and the decision. None is
    # for either value; runs_loop is a function that mustn't be called then.
    rows = {
        "strict, open": (True, False, None, None, None, belonging.JOIN),
        "strict, ended": (True, True, None, None, None, belonging.REFUSE),
        "atomic() open, in the thread that entered the block": (
            *(False, False, True, None, None),
            belonging.JOIN,
        ),
        "atomic() open, brought to another thread by asgiref": (
            *(False, False, False, True, None),
            belonging.JOIN,
        ),
        "atomic() open, in another thread, while its own runs a loop": (
            *(False, False, False, False, True),
            belonging.JOIN,
        ),
        "atomic() open, in another thread otherwise": (
            *(False, False, False, False, False),
            belonging.OWN,
        ),
        "atomic() ended": (False, True, None, None, None, belonging.SKIP),
    }

    def test_rows(self):
        for name, (
            strict,
            ended,
            same_thread,
            moved,
            loop,
            expected,
        ) in self.rows.items():
            for same, by_asgiref in itertools.product((True, False), repeat=2):
                if same_thread not in (None, same) or moved not in (None, by_asgiref):
                    continue
                with self.subTest(name, same_thread=same, moved=by_asgiref):
                    decision = belonging.decide(
                        strict=strict,
                        ended=ended,
                        same_thread=same,
                        moved=by_asgiref,
                        runs_loop=unused if loop is None else lambda: loop,
                    )
                    self.assertEqual(decision, expected)


def own_connection():
    """Return whether this thread has a connection of its own, closing it."""
    used = connections["default"]
    own = used is getattr(connections._connections, "default", None)
    if own and used is not main_connection.get():
        used.close()
    return own


main_connection = contextvars.ContextVar("main_connection", default=None)


class DecisionTests(TransactionTestCase):
    available_apps = ["db_belonging"]

    def setUp(self):
        main_connection.set(connections["default"])

    def joined(self):
        return connections["default"] is main_connection.get()

    def test_no_block(self):
        self.assertIsNone(belonging.current())
        self.assertIs(own_connection(), True)

    def test_thread_that_entered(self):
        with transaction.atomic():
            self.assertIs(self.joined(), True)
            # Also without the context of the block.
            context = contextvars.Context()
            self.assertIs(
                context.run(connections.__getitem__, "default"), main_connection.get()
            )
            Item.objects.create(name="context")
            context.run(Item.objects.create, name="no context")
            transaction.set_rollback(True)
        self.assertIs(Item.objects.exists(), False)

    def test_threads_with_a_copy_of_the_context(self):
        """With copy_context().run() or without, it has its own connection."""
        with transaction.atomic():
            context = contextvars.copy_context()
            with ThreadPoolExecutor(1) as executor:
                self.assertIs(executor.submit(own_connection).result(), True)
                self.assertIs(
                    executor.submit(context.run, own_connection).result(), True
                )
            # As in today's Django, in the same thread it's the block's.
            self.assertIs(context.run(self.joined), True)

    def test_threads_below_a_waiting_event_loop(self):
        """The block's thread runs a loop further out than the block."""

        def view():
            with transaction.atomic():
                with ThreadPoolExecutor(1) as executor:
                    context = contextvars.copy_context()
                    return executor.submit(context.run, own_connection).result()

        async def main():
            return await sync_to_async(view)()

        self.assertIs(async_to_sync(main)(), True)

    def test_hundred_contexts_in_one_thread(self):
        used = {
            id(contextvars.copy_context().run(connections.__getitem__, "default"))
            for _ in range(100)
        }
        self.assertEqual(len(used), 1)

    def test_brought_by_asgiref(self):
        async def main():
            return (
                await sync_to_async(self.joined)(),
                await sync_to_async(self.joined, thread_sensitive=False)(),
                await asyncio.create_task(sync_to_async(self.joined)()),
            )

        with transaction.atomic():
            self.assertEqual(async_to_sync(main)(), (True, True, True))
            self.assertEqual(asyncio.run(main()), (True, True, True))

    def test_to_thread(self):
        async def main():
            return await asyncio.to_thread(self.joined)

        with transaction.atomic():
            self.assertIs(asyncio.run(main()), True)
            self.assertIs(async_to_sync(main)(), True)

    def test_coroutine(self):
        async def main():
            return self.joined(), connections["default"].in_atomic_block

        with transaction.atomic():
            self.assertEqual(async_to_sync(main)(), (True, True))

    def test_ended(self):
        with transaction.atomic():
            context = contextvars.copy_context()
        self.assertIs(context.run(own_connection), True)
        with transaction.atomic():
            with transaction.atomic():
                context = contextvars.copy_context()
            self.assertIs(context.run(self.joined), True)

    def test_assigned_connection(self):
        """What's assigned to an alias in a block is used there, as today."""
        original = connections["default"]
        with transaction.atomic():
            copy = original.copy()
            connections["default"] = copy
            try:
                self.assertIs(connections["default"], copy)
            finally:
                connections["default"] = original

    def test_left_in_another_context(self):
        atomic = transaction.atomic()
        contextvars.copy_context().run(atomic.__enter__)
        self.assertEqual(len(connection.blocks), 1)
        Item.objects.create(name="item")
        atomic.__exit__(None, None, None)
        self.assertEqual(connection.blocks, [])
        self.assertIs(Item.objects.exists(), True)

    def test_closed_in_a_block(self):
        if connection.vendor == "sqlite" and connection.is_in_memory_db():
            self.skipTest("Closing it would destroy the database.")
        with transaction.atomic():
            connection.close()
        self.assertEqual(connection.blocks, [])
        with transaction.atomic():
            Item.objects.create(name="item")
        self.assertIs(Item.objects.exists(), True)

    def test_blocks_without_a_second_execution_take_no_turns(self):
        with transaction.atomic(), transaction.atomic():
            self.assertIsNone(connection.turn)
            self.assertEqual(len(connection.blocks), 2)
        self.assertEqual(connection.blocks, [])

    def test_close_all_leaves_blocks_of_others_alone(self):
        async def main():
            await sync_to_async(connections.close_all, thread_sensitive=False)()
            await sync_to_async(Item.objects.create)(name="item")

        with transaction.atomic():
            async_to_sync(main)()
            self.assertIs(connection.in_atomic_block, True)
        self.assertIs(Item.objects.exists(), True)

    def test_thread_sharing_stays_as_it_is(self):
        """Threads that were given a connection don't wait for a turn."""
        failures = []

        def use(shared):
            connections["default"] = shared
            try:
                with connections["default"].cursor() as cursor:
                    cursor.execute("SELECT 1")
            except Exception as exc:
                failures.append(exc)

        connection.inc_thread_sharing()
        try:
            with transaction.atomic():
                thread = threading.Thread(target=use, args=[connections["default"]])
                thread.start()
                thread.join()
        finally:
            connection.dec_thread_sharing()
        self.assertEqual(failures, [])


class AsyncSafetyTests(TransactionTestCase):
    """Promise 14: database access on a loop's thread is refused."""

    available_apps = ["db_belonging"]

    def test_sync_access_in_a_coroutine(self):
        async def main():
            for use in (
                Item.objects.exists,
                connections["default"].cursor,
                transaction.atomic().__enter__,
            ):
                with self.assertRaises(SynchronousOnlyOperation):
                    use()

        asyncio.run(main())
        with transaction.atomic():
            async_to_sync(main)()
            Item.objects.create(name="usable")
        self.assertIs(Item.objects.exists(), True)


class AsgirefTests(SimpleTestCase):
    """What belonging relies on in asgiref, beyond its documentation."""

    def test_storages_are_tagged_with_the_thread(self):
        variable = contextvars.ContextVar("variable")
        data = object()
        here = threading.get_ident()
        variable.set(belonging._Storage(here, data))

        def look():
            storage = variable.get()
            return storage.thread_id == threading.get_ident(), storage.data is data

        async def main():
            return (
                look(),
                await sync_to_async(look)(),
                await sync_to_async(look, thread_sensitive=False)(),
                await asyncio.to_thread(look),
            )

        self.assertEqual(
            async_to_sync(main)(),
            ((True, True), (True, True), (True, True), (False, True)),
        )

    def test_exited_is_asked_before_the_context_is_copied(self):
        variable = contextvars.ContextVar("variable", default="wrong")

        class Context(ThreadSensitiveContext):
            def __init__(self):
                pass

            @property
            def _exited(self):
                variable.set("right")
                return False

        async def main():
            SyncToAsync.thread_sensitive_context.set(Context())
            return await sync_to_async(variable.get)()

        with mock.patch.dict(SyncToAsync.context_to_thread_executor):
            self.assertEqual(asyncio.run(main()), "right")
