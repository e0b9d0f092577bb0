"""
Promises 3, 5, 7, 8 and 12: aiterator() streams in chunks, holds its connection
until it's done, and gives it back whoever ends it, in either mode.
"""

import asyncio
import gc
import math
import os
import time
import unittest
from contextlib import aclosing, nullcontext, suppress
from unittest import mock

from asgiref.sync import async_to_sync

from django.db import connection, connections, run_sync, transaction
from django.db.models import Case, Func, IntegerField, TextField, Value, When
from django.db.transaction import TransactionManagementError
from django.test import TransactionTestCase

from .base import PoolMixin
from .cancelling import cancel_everywhere
from .models import Author, Book
from .test_orm import no_threads

NUMBER = 25

is_native = "default" in connections.native_aliases


STATM = "/proc/self/statm"


def resident_size():
    """Return the size of this process, libpq's results included, in bytes."""
    with open(STATM) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Rollback(Exception):
    pass


class IteratorTestCase(TransactionTestCase):
    available_apps = ["async_bridge", "django.contrib.contenttypes"]

    def setUp(self):
        for number in range(NUMBER):
            author = Author.objects.create(name=f"author {number:02}")
            Book.objects.create(name=f"book {number:02}", author=author)
        self.authors = Author.objects.order_by("name")


class ResultTests(IteratorTestCase):
    """The same as that of iterator()."""

    async def assertSameResult(self, queryset, chunk_size=10):
        expected = await run_sync(lambda: list(queryset.iterator(chunk_size)))
        self.assertEqual(len(expected), NUMBER)
        result = [item async for item in queryset.aiterator(chunk_size)]
        self.assertEqual(result, expected)

    async def test_kinds_of_rows(self):
        for queryset in (
            self.authors,
            self.authors.values(),
            self.authors.values_list("pk", "name"),
            self.authors.values_list("name", flat=True),
            self.authors.values_list("name", named=True),
        ):
            with self.subTest(iterable=queryset._iterable_class.__name__):
                await self.assertSameResult(queryset)

    async def test_values_list_without_threads(self):
        """Its query isn't executed by asking it for an iterator."""
        iterator = self.authors.values_list("name").aiterator()
        await Author.objects.aexists()
        with no_threads() if is_native else nullcontext():
            rows = [row async for row in iterator]
        self.assertEqual(len(rows), NUMBER)

    async def test_left_without_threads(self):
        # A pool is opened by threads.
        await Author.objects.aexists()
        with no_threads() if is_native else nullcontext():
            async with aclosing(self.authors.aiterator(2)) as iterator:
                async for _ in iterator:
                    break

    async def test_chunk_sizes(self):
        for chunk_size in (1, NUMBER - 1, NUMBER, NUMBER + 1):
            with self.subTest(chunk_size=chunk_size):
                await self.assertSameResult(self.authors, chunk_size)

    async def test_prefetch(self):
        for chunk_size in (1, 10, NUMBER, NUMBER + 1):
            with self.subTest(chunk_size=chunk_size):
                queryset = self.authors.prefetch_related("book_set__editors")
                names = []
                async for author in queryset.aiterator(chunk_size):
                    # Or this would be refused.
                    names += [book.name for book in author.book_set.all()]
                self.assertEqual(names, [f"book {n:02}" for n in range(NUMBER)])

    async def test_raw(self):
        table = Author._meta.db_table
        queryset = Author.objects.raw(f"SELECT * FROM {table} ORDER BY name")
        names = [author.name async for author in queryset]
        self.assertEqual(names, [f"author {n:02}" for n in range(NUMBER)])
        queryset = queryset.prefetch_related("book_set")
        names = [[book.name for book in a.book_set.all()] async for a in queryset]
        self.assertEqual(names, [[f"book {n:02}"] for n in range(NUMBER)])

    async def test_queries_in_the_body(self):
        """Of this task, of others, and of an iterator on the same rows."""
        found = []

        async def look_up(name):
            found.append((await Book.objects.aget(author__name=name)).name)

        async for author in self.authors.aiterator(2):
            await look_up(author.name)
            await asyncio.gather(*(look_up(author.name) for _ in range(2)))
            async with aclosing(self.authors.aiterator(10)) as others:
                async for other in others:
                    if other == author:
                        break
        expected = [f"book {number:02}" for number in range(NUMBER)]
        self.assertEqual(found[::3], expected)
        self.assertEqual(len(found), 3 * NUMBER)

    async def test_writes_in_the_body(self):
        async for author in self.authors.aiterator(2):
            async with transaction.aatomic():
                await Book.objects.acreate(author=author, name="another")
        self.assertEqual(await Book.objects.acount(), 2 * NUMBER)

    async def test_two_at_once(self):
        async def names():
            return [a.name async for a in self.authors.aiterator(2)]

        results = await asyncio.gather(*(names() for _ in range(5)))
        expected = [f"author {number:02}" for number in range(NUMBER)]
        self.assertEqual(results, [expected] * 5)


def open_cursors():
    """Return the number of cursors that are open in the session."""
    with transaction.get_connection().cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM pg_cursors WHERE name LIKE '\\_django%'")
        return cursor.fetchone()[0]


class EndingsMixin:
    """
    Each way to end an iteration leaves no cursor, and nothing breaks for
    whoever goes on with the connection.
    """

    async def assertCursors(self, expected):
        # The event loop closes abandoned generators in tasks of its own.
        for _ in range(100):
            if await run_sync(open_cursors) == expected:
                return
            await asyncio.sleep(0.01)
        self.assertEqual(await run_sync(open_cursors), expected)

    async def start(self, **kwargs):
        iterator = self.authors.aiterator(2, **kwargs)
        self.assertEqual((await anext(iterator)).name, "author 00")
        return iterator

    async def test_exhausted(self):
        iterator = await self.start()
        await self.assertCursors(1)
        self.assertEqual(len([item async for item in iterator]), NUMBER - 1)
        self.assertEqual(await run_sync(open_cursors), 0)

    async def test_aclose(self):
        iterator = await self.start()
        await self.assertCursors(1)
        await iterator.aclose()
        self.assertEqual(await run_sync(open_cursors), 0)

    async def test_aclose_while_prefetching(self):
        self.authors = self.authors.prefetch_related("book_set")
        iterator = await self.start()
        await self.assertCursors(1)
        await iterator.aclose()
        self.assertEqual(await run_sync(open_cursors), 0)

    async def test_break(self):
        async for _ in self.authors.aiterator(2):
            await self.assertCursors(1)
            break
        await self.assertCursors(0)
        self.assertEqual(await Author.objects.acount(), NUMBER)

    async def test_exception(self):
        with self.assertRaises(Rollback):
            async for _ in self.authors.aiterator(2):
                raise Rollback
        await self.assertCursors(0)
        self.assertEqual(await Author.objects.acount(), NUMBER)

    async def test_unstarted(self):
        iterator = self.authors.aiterator(2)
        await iterator.aclose()
        await self.assertCursors(0)

    async def test_other_task(self):
        iterator = await self.start()

        async def go_on():
            await anext(iterator)
            await iterator.aclose()

        await asyncio.create_task(go_on())
        await self.assertCursors(0)
        self.assertEqual(await Author.objects.acount(), NUMBER)

    async def test_many_abandoned(self):
        async def abandon():
            async for _ in self.authors.aiterator(2):
                break

        await asyncio.gather(*(abandon() for _ in range(10)))
        await self.assertCursors(0)
        self.assertEqual(await Author.objects.acount(), NUMBER)

    async def iterate_slowly(self):
        """The first slice arrives, and the next one doesn't."""
        slow = self.authors.annotate(
            slept=Case(
                When(name__lt="author 02", then=None),
                default=Func(Value(20), function="pg_sleep"),
                output_field=TextField(),
            )
        )
        async for author in slow.aiterator(2):
            self.assertLess(author.name, "author 02")

    async def test_database_error(self):
        queryset = self.authors.extra(where=["1 / (id - id) = 1"])
        with self.assertRaises(Exception) as cm:
            async for _ in queryset.aiterator(2):
                pass
        self.assertIn("division by zero", str(cm.exception))


class CancelledEverywhereMixin:
    @unittest.skipUnless(is_native, "A thread goes on with its query.")
    async def test_cancelled_everywhere(self):
        async def iterate():
            async with aclosing(self.authors.aiterator(10)) as authors:
                async for _ in authors:
                    await asyncio.sleep(0)

        async for _ in cancel_everywhere(self, iterate):
            await self.assertCursors(0)


@unittest.skipUnless(connection.vendor == "postgresql", "Needs server-side cursors.")
class EndingTests(CancelledEverywhereMixin, EndingsMixin, IteratorTestCase):
    """Outside of blocks."""

    @unittest.skipUnless(is_native, "A thread may wait.")
    async def test_dropped_by_asynchronous_code(self):
        """
        What can't be closed without blocking the loop is left to the server.
        """

        def start():
            iterator = self.authors.iterator(2)
            next(iterator)
            return iterator

        def sleep():
            with connections["default"].cursor() as cursor:
                cursor.execute("SELECT pg_sleep(0.2)")

        iterator = await run_sync(start)
        task = asyncio.create_task(run_sync(sleep))
        await asyncio.sleep(0.1)
        # The connection is in use, by code that needs the loop to go on.
        began = time.monotonic()
        del iterator
        self.assertLess(time.monotonic() - began, 1)
        await task
        self.assertEqual(await Author.objects.acount(), NUMBER)
        await run_sync(connections["default"].close)

    @unittest.skipIf(is_native, "A thread goes on with its query.")
    async def test_cancelled_while_a_thread_reads(self):
        """
        The cursor is closed in the thread, and not by whom the generator is
        collected. That can be the event loop, which would wait for whoever
        uses the connection.
        """
        errors = []

        async def iterate():
            try:
                async for _ in self.authors.aiterator(10):
                    await asyncio.sleep(0)
            except asyncio.CancelledError as error:
                # It refers to the generator.
                errors.append(error)
                raise

        async for _ in cancel_everywhere(self, iterate):
            self.assertEqual(await run_sync(open_cursors), 0)
        self.assertGreater(len(errors), 1)

    @unittest.skipUnless(is_native, "A thread goes on with its query.")
    async def test_cancelled(self):
        with self.assertRaises(TimeoutError):
            async with asyncio.timeout(0.2):
                await self.iterate_slowly()
        await self.assertCursors(0)
        self.assertEqual(await Author.objects.acount(), NUMBER)


def inside_blocks(cls):
    for name, test in vars(EndingsMixin).items():
        if name.startswith("test_") and name not in vars(cls):
            setattr(cls, name, transaction.aatomic()(test))
    return cls


@unittest.skipUnless(connection.vendor == "postgresql", "Needs server-side cursors.")
@inside_blocks
class EndingInBlockTests(EndingsMixin, IteratorTestCase):
    """Inside a block, on its connection."""

    async def test_database_error(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await super().test_database_error()
                raise Rollback

    async def test_cancelled(self):
        with self.assertRaises(TimeoutError):
            async with transaction.aatomic():
                async with asyncio.timeout(0.2):
                    await self.iterate_slowly()
        self.assertEqual(await Author.objects.acount(), NUMBER)

    async def test_cancellation_is_swallowed(self):
        msg = "A query on the database 'default' was cancelled inside the block"
        with self.assertRaisesMessage(TransactionManagementError, msg):
            async with transaction.aatomic():
                await Author.objects.acreate(name="lost")
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await self.iterate_slowly()
        self.assertEqual(await Author.objects.acount(), NUMBER)

    async def test_nested_block_is_rolled_back(self):
        """The cursor has gone then. Closing it again would be an error."""
        async with transaction.aatomic():
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    async for _ in self.authors.aiterator(2):
                        raise Rollback
            await self.assertCursors(0)
            await Author.objects.acreate(name="new")
        self.assertEqual(await Author.objects.acount(), NUMBER + 1)

    async def test_closed_after_nested_block(self):
        for exception in (None, Rollback):
            with self.subTest(exception=exception):
                async with transaction.aatomic():
                    try:
                        async with transaction.aatomic():
                            iterator = await self.start()
                            if exception is not None:
                                raise exception
                    except Rollback:
                        pass
                    await iterator.aclose()
                    self.assertEqual(await Author.objects.acount(), NUMBER)

    async def test_closed_after_the_block(self):
        """What the connection does next isn't disturbed."""
        async with transaction.aatomic():
            iterator = await self.start()
        async with transaction.aatomic():
            await Author.objects.acreate(name="new")
            await iterator.aclose()
            await Author.objects.acreate(name="newer")
        self.assertEqual(await Author.objects.acount(), NUMBER + 2)

    def test_closed_after_synchronous_block(self):
        with transaction.atomic():
            # Another thread takes part, so turns are taken from here on.
            async_to_sync(asyncio.to_thread)(Author.objects.count)
            iterator = self.authors.iterator(2)
            next(iterator)
        with transaction.atomic():
            Author.objects.create(name="new")
            iterator.close()
            self.assertEqual(Author.objects.count(), NUMBER + 1)

    async def test_abandoned_at_the_end_of_the_block(self):
        async with transaction.aatomic():
            iterator = await self.start()
        del iterator
        async with transaction.aatomic():
            gc.collect()
            for _ in range(10):
                await asyncio.sleep(0)
            await Author.objects.acreate(name="new")
        self.assertEqual(await Author.objects.acount(), NUMBER + 1)


@unittest.skipUnless(connection.vendor == "postgresql", "Needs server-side cursors.")
class StreamingTests(IteratorTestCase):
    def rows(self, number):
        """Return a query set with one row for each number up to `number`."""
        series = Func(
            Value(1),
            Value(number),
            function="generate_series",
            output_field=IntegerField(),
            set_returning=True,
        )
        return Author.objects.filter(name="author 00").annotate(number=series)

    @unittest.skipUnless(os.path.exists(STATM), "Needs Linux.")
    async def test_memory(self):
        """A million rows of 200 characters need next to nothing."""
        text = Func(Value("x"), Value(200), function="repeat", output_field=TextField())
        # What is imported and cached by the first ones isn't counted.
        for expected in (1000, 1_000_000):
            start = resident_size()
            rows = self.rows(expected).annotate(text=text)
            async for number, _ in rows.values_list("number", "text").aiterator(1000):
                if number % 50_000 == 1:
                    self.assertLess(resident_size() - start, 20_000_000)
            self.assertEqual(number, expected)

    async def test_rows_are_made_when_they_are_asked_for(self):
        def create_sequence():
            with transaction.get_connection().cursor() as cursor:
                cursor.execute("CREATE TEMPORARY SEQUENCE made")

        def last_value():
            with transaction.get_connection().cursor() as cursor:
                cursor.execute("SELECT last_value FROM made")
                return cursor.fetchone()[0]

        made = Func(Value("made"), function="nextval", output_field=IntegerField())
        rows = self.rows(1_000_000).annotate(made=made)
        # Outside of blocks, the server keeps all rows of a cursor.
        async with transaction.aatomic():
            await run_sync(create_sequence)
            async with aclosing(rows.aiterator(10)) as iterator:
                for number in range(1, 26):
                    await anext(iterator)
                    expected = math.ceil(number / 10) * 10
                    self.assertEqual(await run_sync(last_value), expected)

    async def test_without_server_side_cursors(self):
        with mock.patch.dict(
            connection.settings_dict, {"DISABLE_SERVER_SIDE_CURSORS": True}
        ):
            numbers = []
            async for author in self.rows(100).aiterator(10):
                self.assertEqual(await run_sync(open_cursors), 0)
                numbers.append(author.number)
        self.assertEqual(numbers, list(range(1, 101)))


class FullPoolMixin(PoolMixin):
    """Everything is back as soon as a test has ended."""

    pool_options = {"min_size": 0, "max_size": 2, "timeout": 5}

    def check_pool(self):
        self.close_connections()
        self.assertEqual(self.checked_out(), 0)


@unittest.skipUnless(connection.vendor == "postgresql", "Needs server-side cursors.")
class PooledResultTests(FullPoolMixin, ResultTests):
    pass


@unittest.skipUnless(connection.vendor == "postgresql", "Needs server-side cursors.")
class PooledNamesTests(FullPoolMixin, TransactionTestCase):
    available_apps = ["async_bridge"]
    pool_options = {"min_size": 0, "max_size": 1, "timeout": 5}

    def test_session_with_a_cursor_of_another_connection(self):
        """
        A stream that its client leaves keeps its cursor until it's collected.
        Then the next request has the session, and a thread with the same
        identity.
        """
        for _ in range(2):
            other = connection.copy()
            cursor = other.chunked_cursor()
            cursor.execute("SELECT 1")
            other.close()
            self.addCleanup(cursor.close)


@unittest.skipUnless(is_native, "Threads keep their connection.")
class PooledEndingTests(
    FullPoolMixin, CancelledEverywhereMixin, EndingsMixin, IteratorTestCase
):
    """An iterator holds its connection, and returns it at once at its end."""

    async def assertCursors(self, expected):
        for _ in range(100):
            if self.checked_out() == expected:
                return
            await asyncio.sleep(0.01)
        self.assertEqual(self.checked_out(), expected)

    async def test_held(self):
        iterators = [await self.start() for _ in range(2)]
        self.assertEqual(self.checked_out(), 1)
        other = await asyncio.create_task(self.start())
        self.assertEqual(self.checked_out(), 2)
        await iterators[0].aclose()
        self.assertEqual(self.checked_out(), 2)
        await iterators[1].aclose()
        self.assertEqual(self.checked_out(), 1)
        await other.aclose()
        self.assertEqual(self.checked_out(), 0)

    async def test_closed_during_an_operation_of_its_task(self):
        """That keeps the connection until its own end."""
        begun, closed = asyncio.Event(), asyncio.Event()

        async def meanwhile():
            begun.set()
            await asyncio.wait_for(closed.wait(), 10)

        def operate():
            with connections["default"].cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                before = cursor.fetchone()
                async_to_sync(meanwhile)()
                cursor.execute("SELECT pg_backend_pid()")
                self.assertEqual(cursor.fetchone(), before)

        async def owner():
            iterators.append(await self.start())
            await run_sync(operate)

        iterators = []
        task = asyncio.create_task(owner())
        await asyncio.wait_for(begun.wait(), 10)
        await iterators[0].aclose()
        self.assertEqual(self.checked_out(), 1)
        closed.set()
        await task
        self.assertEqual(self.checked_out(), 0)
