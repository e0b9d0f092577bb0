"""
Promises 12, 14 and 17: in a project with native and other databases, each
operation runs as its database asks.
"""

import asyncio
import unittest
from contextlib import aclosing, suppress
from unittest import mock

from asgiref.sync import async_to_sync, sync_to_async

from django.contrib.contenttypes.models import ContentType
from django.contrib.sessions.backends.db import SessionStore
from django.core.cache.backends.db import DatabaseCache
from django.core.cache.backends.locmem import LocMemCache
from django.core.exceptions import SynchronousOnlyOperation
from django.core.paginator import AsyncPaginator
from django.db import connection, connections, run_sync, transaction
from django.db.async_calls import alias_of
from django.db.backends.utils import CursorWrapper
from django.db.models import (
    Count,
    Prefetch,
    aprefetch_related_objects,
    prefetch_related_objects,
)
from django.db.models.signals import post_save
from django.db.utils import ConnectionDoesNotExist
from django.test import (
    SimpleTestCase,
    TestCase,
    TransactionTestCase,
    override_settings,
)

from .models import Author, Book


class ByName:
    """Read from "replica" and write to "primary", but what's in "home"."""

    def db_for_read(self, model, instance=None, **hints):
        return "home" if instance and instance._state.db == "home" else "replica"

    def db_for_write(self, model, instance=None, **hints):
        return "home" if instance and instance._state.db == "home" else "primary"


@override_settings(DATABASE_ROUTERS=[ByName()])
class TableTests(SimpleTestCase):
    """The alias is the one that the method itself is going to choose."""

    def assertAlias(self, expected, func, *args, **kwargs):
        self.assertEqual(alias_of(func, args, kwargs), expected)

    def test_query_set(self):
        objects = Author.objects.all()
        for name in "_fetch_all aggregate contains count exists get last".split():
            with self.subTest(name=name):
                self.assertAlias("replica", getattr(objects, name))
                self.assertAlias("one", getattr(objects.using("one"), name))
                locking = objects.select_for_update()
                self.assertAlias("primary", getattr(locking, name))
        for name in "bulk_create create delete get_or_create update".split():
            with self.subTest(name=name):
                self.assertAlias("primary", getattr(objects, name))
                self.assertAlias("one", getattr(objects.using("one"), name))

    def test_raw_query_set(self):
        raw = Author.objects.raw("SELECT 1")
        self.assertAlias("replica", raw._fetch_all)
        self.assertAlias("one", raw.using("one")._fetch_all)

    def test_list(self):
        self.assertAlias("replica", list, Author.objects.all())
        self.assertAlias("one", list, Author.objects.using("one"))
        self.assertAlias(None, list, "abc")

    def test_model(self):
        for state, write, read in (
            (None, "primary", "replica"),
            ("home", "home", "home"),
        ):
            author = Author(pk=1)
            author._state.db = state
            with self.subTest(state=state):
                self.assertAlias(write, author.save)
                self.assertAlias(write, author.delete)
                self.assertAlias(read, author.refresh_from_db)
                for func in (author.save, author.delete, author.refresh_from_db):
                    self.assertAlias("one", func, using="one")
                queryset = Author.objects.using("one")
                func = author.refresh_from_db
                self.assertAlias("one", func, from_queryset=queryset)
                self.assertAlias("two", func, from_queryset=queryset, using="two")

    def test_related_managers(self):
        author, book = Author(pk=1), Book(pk=1)
        for manager in (author.book_set, book.editors, author.edited):
            for name in "add clear create get_or_create remove set".split():
                with self.subTest(manager=manager, name=name):
                    manager.instance._state.db = None
                    self.assertAlias("primary", getattr(manager, name))
                    manager.instance._state.db = "home"
                    self.assertAlias("home", getattr(manager, name))

    def test_prefetch(self):
        author = Author(pk=1)
        self.assertAlias("replica", prefetch_related_objects, [author], "book_set")
        author._state.db = "home"
        self.assertAlias("home", prefetch_related_objects, {author}, "book_set")

    def test_cache(self):
        cache = DatabaseCache("table", {})
        for name in ("get", "get_many", "has_key"):
            self.assertAlias("replica", getattr(cache, name))
        for name in ("set", "add", "touch", "delete", "clear", "incr"):
            self.assertAlias("primary", getattr(cache, name))

    def test_anything_else(self):
        self.assertAlias(None, LocMemCache("", {}).get)
        self.assertAlias(None, lambda: None)
        self.assertAlias(None, print)


@unittest.skipUnless(
    connections.native_aliases == {"other"}, "Needs that only 'other' is native."
)
class MixedTestCase(TransactionTestCase):
    available_apps = [
        "async_bridge",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
    ]
    databases = {"default", "other"}

    def setUp(self):
        for using in self.databases:
            # Asynchronous code can't look it up when it asks for a manager.
            ContentType.objects.db_manager(using).get_for_model(Book)
        # Where statements were executed: (alias, whether on the loop's thread)
        self.executed = executed = set()
        execute = CursorWrapper._execute

        def note(self, *args):
            loop = asyncio._get_running_loop()
            executed.add((self.db.alias, loop is not None))
            return execute(self, *args)

        patcher = mock.patch.object(CursorWrapper, "_execute", note)
        patcher.start()
        self.addCleanup(patcher.stop)

    def assertExecuted(self, *aliases):
        self.assertEqual(
            self.executed, {(alias, alias == "other") for alias in aliases}
        )
        self.executed.clear()


class OperationTests(MixedTestCase):
    """On the loop for "other", and in a thread for "default"."""

    async def query_set(self, using):
        authors = Author.objects.using(using)
        author = await authors.acreate(name="a")
        await authors.abulk_create([Author(name="b"), Author(name="c")])
        await authors.aupdate_or_create(name="d", defaults={"created": None})
        await authors.filter(name="b").adelete()
        self.assertEqual(await authors.aget(name="a"), author)
        self.assertEqual(await authors.acount(), 3)
        self.assertEqual(await authors.aaggregate(n=Count("*")), {"n": 3})
        self.assertEqual([a.name async for a in authors.order_by("name")], [*"acd"])

    async def iterator(self, using):
        authors = Author.objects.using(using)
        await authors.abulk_create([Author(name=f"{n}") for n in range(5)])
        async with aclosing(authors.aiterator(2)) as iterator:
            await anext(iterator)
        names = authors.prefetch_related("book_set").values_list("name", flat=True)
        self.assertEqual(len([name async for name in names.aiterator(2)]), 5)

    async def raw(self, using):
        raw = Author.objects.raw(f"SELECT * FROM {Author._meta.db_table}")
        self.assertEqual([a async for a in raw.using(using)], [])

    async def model(self, using):
        author = Author(name="a")
        await author.asave(using=using)
        await author.arefresh_from_db()
        await author.asave()
        await author.adelete()

    async def related_managers(self, using):
        author = await Author.objects.using(using).acreate(name="a")
        book = await author.book_set.acreate(name="b")
        await author.book_set.aremove(book)
        await book.editors.aset([author])
        self.assertEqual([a async for a in book.editors.all()], [author])
        await aprefetch_related_objects([book], "editors")

    async def generic_relation(self, using):
        book = await Book.objects.using(using).acreate(name="b")
        await book.labels.acreate(name="l")
        self.assertEqual(await book.labels.acount(), 1)

    async def paginator(self, using):
        authors = Author.objects.using(using).order_by("name")
        await authors.acreate(name="a")
        page = await AsyncPaginator(authors, 10).apage(1)
        self.assertEqual([a.name for a in await page.aget_object_list()], ["a"])

    async def transaction_functions(self, using):
        async with transaction.aatomic(using=using):
            sid = await transaction.asavepoint_create(using=using)
            await Author.objects.using(using).acreate(name="a")
            await transaction.asavepoint_rollback(sid, using=using)
        await transaction.aset_autocommit(False, using=using)
        await Author.objects.using(using).acreate(name="b")
        await transaction.acommit(using=using)
        await transaction.aset_autocommit(True, using=using)
        self.assertEqual((await Author.objects.using(using).aget()).name, "b")

    async def test_operations(self):
        for operate in (
            self.query_set,
            self.iterator,
            self.raw,
            self.model,
            self.related_managers,
            self.generic_relation,
            self.paginator,
            self.transaction_functions,
        ):
            for using in ("default", "other"):
                with self.subTest(operation=operate.__name__, using=using):
                    await sync_to_async(Author.objects.using(using).all().delete)()
                    self.executed.clear()
                    await operate(using)
                    self.assertExecuted(using)

    async def test_both_at_once(self):
        async def create(using, name):
            await Author.objects.using(using).acreate(name=name)

        names = [f"{number}" for number in range(10)]
        await asyncio.gather(
            *(create(using, name) for using in self.databases for name in names)
        )
        self.assertExecuted("default", "other")
        for using in self.databases:
            found = Author.objects.using(using).values_list("name", flat=True)
            self.assertEqual(sorted([name async for name in found]), names)

    def test_session(self):
        class Router:
            using = None

            def db_for_read(self, model, **hints):
                return self.using

            db_for_write = db_for_read

        async def main():
            session = SessionStore()
            await session.aset("key", "value")
            await session.asave()
            session = SessionStore(session.session_key)
            self.assertEqual(await session.aget("key"), "value")
            await session.adelete()

        with override_settings(DATABASE_ROUTERS=[router := Router()]):
            for using in ("default", "other"):
                with self.subTest(using=using):
                    router.using = using
                    async_to_sync(main)()
                    self.assertExecuted(using)


class StrayTests(MixedTestCase):
    msg = "The database 'default' can't be used here, because code that runs on the "

    async def test_run_sync(self):
        result = await run_sync(Author.objects.using("other").count)
        self.assertEqual(result, 0)
        self.assertExecuted("other")
        with self.assertRaisesMessage(SynchronousOnlyOperation, self.msg) as cm:
            await run_sync(Author.objects.using("default").count)
        self.assertIn("sync_to_async() instead of run_sync()", str(cm.exception))
        self.assertExecuted()

    async def test_the_alternative(self):
        def copy():
            for author in Author.objects.using("other"):
                author.save(using="default", force_insert=True)

        await Author.objects.using("other").acreate(name="a")
        with self.assertRaisesMessage(SynchronousOnlyOperation, self.msg):
            await run_sync(copy)
        await sync_to_async(copy)()
        self.assertEqual((await Author.objects.aget()).name, "a")

    async def test_receiver(self):
        """The block goes on: nothing was sent to either database."""

        def copy(instance, using, **kwargs):
            if using == "other":
                Author(name=instance.name).save(using="default")

        post_save.connect(copy, sender=Author)
        self.addCleanup(post_save.disconnect, copy, sender=Author)
        async with transaction.aatomic(using="other"):
            with self.assertRaisesMessage(SynchronousOnlyOperation, self.msg):
                async with transaction.aatomic(using="other"):
                    await Author.objects.using("other").acreate(name="a")
            await Book.objects.using("other").acreate(name="b")
        self.assertExecuted("other")
        self.assertIs(await Author.objects.using("other").aexists(), False)
        self.assertIs(await Book.objects.using("other").aexists(), True)

    async def test_prefetch_from_another_database(self):
        queryset = Book.objects.using("default")
        author = await Author.objects.using("other").acreate(name="a")
        with self.assertRaisesMessage(SynchronousOnlyOperation, self.msg):
            await aprefetch_related_objects([author], Prefetch("book_set", queryset))

    async def test_look_at_the_connection(self):
        """That doesn't block."""
        self.assertEqual(await run_sync(lambda: connection.vendor), "postgresql")


class BlockTests(MixedTestCase):
    async def create(self):
        for using in ("default", "other"):
            await Author.objects.using(using).acreate(name="a")

    async def counts(self):
        return [
            await Author.objects.using(using).acount() for using in ("default", "other")
        ]

    async def test_one_inside_the_other(self):
        for outer, inner in (("default", "other"), ("other", "default")):
            for exception in (None, KeyError):
                with self.subTest(outer=outer, exception=exception):
                    before = await self.counts()
                    with suppress(KeyError):
                        async with transaction.aatomic(using=outer):
                            async with transaction.aatomic(using=inner):
                                await asyncio.gather(self.create(), self.create())
                                if exception is not None:
                                    raise exception
                    added = 0 if exception else 2
                    expected = [count + added for count in before]
                    self.assertEqual(await self.counts(), expected)
                    self.assertExecuted("default", "other")

    async def test_thread(self):
        """It's inside both."""

        def create():
            for using in ("default", "other"):
                Author.objects.using(using).create(name="a")

        with suppress(KeyError):
            async with transaction.aatomic("default"), transaction.aatomic("other"):
                await sync_to_async(create)()
                self.assertEqual(await self.counts(), [1, 1])
                raise KeyError
        self.assertEqual(await self.counts(), [0, 0])

    async def test_hooks(self):
        """They can use the database that they have been waiting for."""
        for using in ("default", "other"):
            authors = Author.objects.using(using)

            async def create():
                await self.create()

            with self.subTest(using=using):
                async with transaction.aatomic(using=using):
                    await transaction.aon_commit(
                        lambda: authors.create(name="function"), using=using
                    )
                    await transaction.aon_commit(create, using=using)
                # At once.
                await transaction.aon_commit(
                    lambda: authors.create(name="at once"), using=using
                )
        self.assertEqual(await self.counts(), [4, 4])
        self.assertExecuted("default", "other")

    async def test_hook_strays(self):
        with self.assertRaisesMessage(SynchronousOnlyOperation, StrayTests.msg):
            async with transaction.aatomic(using="other"):
                await transaction.aon_commit(
                    lambda: Author.objects.using("default").create(name="a"),
                    using="other",
                )


class QueryingRouter:
    """Ask one of the databases which one to use."""

    def __init__(self, asked, answer):
        self.asked = asked
        self.answer = answer

    def db_for_read(self, model, **hints):
        if model is not Book:
            return None
        Author.objects.using(self.asked).count()
        return self.answer

    db_for_write = db_for_read


class QueryingRouterTests(MixedTestCase):
    def create(self):
        async def main():
            await Book.objects.acreate(name="a")

        async_to_sync(main)()

    def test_native_database_is_asked(self):
        """Where the operation runs: on the loop if that's its place."""
        with override_settings(DATABASE_ROUTERS=[QueryingRouter("other", "other")]):
            self.create()
        self.assertExecuted("other")

    def test_other_database_is_asked(self):
        """In a thread, since the router can't run on the loop."""
        with override_settings(DATABASE_ROUTERS=[QueryingRouter("default", "other")]):
            self.create()
        self.assertEqual(self.executed, {("default", False), ("other", False)})
        self.assertEqual(Book.objects.using("other").count(), 1)

    def test_error(self):
        """Of the router."""
        with (
            override_settings(DATABASE_ROUTERS=[QueryingRouter("missing", "other")]),
            self.assertRaisesMessage(ConnectionDoesNotExist, "missing"),
        ):
            self.create()


@unittest.skipUnless(
    connections.native_aliases == {"other"}, "Needs that only 'other' is native."
)
class InTestCaseTests(TestCase):
    databases = {"default", "other"}

    @classmethod
    def setUpTestData(cls):
        for using in cls.databases:
            Author.objects.using(using).create(name="before")

    async def assertIsolated(self):
        for using in self.databases:
            authors = Author.objects.using(using)
            self.assertEqual(await authors.acount(), 1)
            await authors.acreate(name="during")
            self.assertEqual(await sync_to_async(authors.count)(), 2)

    async def test_first(self):
        await self.assertIsolated()

    async def test_second(self):
        await self.assertIsolated()
