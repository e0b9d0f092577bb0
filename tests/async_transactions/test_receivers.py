"""
Promise 2: what Django calls on the way is inside the transaction: receivers of
signals, overridden methods, fields, on_delete callables, generic relations,
database routers. So is what channels calls.
"""

import asyncio
import unittest
from importlib.util import find_spec

from asgiref.sync import async_to_sync, sync_to_async

from django.contrib.contenttypes.models import ContentType
from django.db import connections, transaction
from django.db.models import prefetch_related_objects
from django.db.models.signals import post_delete, post_save, pre_save
from django.dispatch import Signal
from django.test import override_settings

from .base import AsyncTransactionTestCase, Rollback, create, names, until
from .models import Entry, Tag


class BothColoursTestCase(AsyncTransactionTestCase):
    def assertInside(self, work, expected):
        """
        What the coroutine function `work` writes is rolled back with a block
        of either colour, and committed with it.
        """

        async def in_aatomic(fails):
            async with transaction.aatomic():
                await work()
                self.assertEqual(await names(), sorted(expected))
                if fails:
                    raise Rollback

        async def call():
            await work()

        def in_atomic(fails):
            with transaction.atomic():
                async_to_sync(call)()
                self.assertNames(*expected)
                if fails:
                    raise Rollback

        for run in (async_to_sync(in_aatomic), in_atomic):
            with self.subTest(run):
                with self.assertRaises(Rollback):
                    run(fails=True)
                self.assertNames()
                run(fails=False)
                self.assertNames(*expected)
                Entry.objects.all().delete()


class SignalTests(BothColoursTestCase):
    def setUp(self):
        super().setUp()
        self.signal = Signal()
        for receiver in (
            self.plain,
            self.block,
            self.failing_block,
            self.async_plain,
            self.async_block,
            self.async_failing_block,
        ):
            self.signal.connect(receiver)

    expected = ["plain", "block", "async plain", "async block", "thread"]

    def plain(self, **kwargs):
        create("plain")

    def block(self, **kwargs):
        with transaction.atomic():
            create("block")

    def failing_block(self, **kwargs):
        with self.assertRaises(Rollback):
            with transaction.atomic():
                create("rolled back")
                raise Rollback

    async def async_plain(self, **kwargs):
        await Entry.objects.acreate(name="async plain")

    async def async_block(self, **kwargs):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="async block")
            await asyncio.to_thread(create, "thread")

    async def async_failing_block(self, **kwargs):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="async rolled back")
                await asyncio.sleep(0)
                raise Rollback

    def test_send(self):
        self.assertInside(lambda: sync_to_async(self.signal.send)(self), self.expected)

    def test_send_robust(self):
        async def work():
            responses = await sync_to_async(self.signal.send_robust)(self)
            self.assertEqual([response for _, response in responses], [None] * 6)

        self.assertInside(work, self.expected)

    def test_asend(self):
        self.assertInside(lambda: self.signal.asend(self), self.expected)

    def test_asend_robust(self):
        async def work():
            responses = await self.signal.asend_robust(self)
            self.assertEqual([response for _, response in responses], [None] * 6)

        self.assertInside(work, self.expected)

    def test_send_from_a_thread(self):
        self.assertInside(
            lambda: asyncio.to_thread(self.signal.send, self), self.expected
        )

    def test_send_from_a_sync_block(self):
        """No event loop has been started before the signal is sent."""
        for fails in (True, False):
            try:
                with transaction.atomic():
                    self.signal.send(self)
                    if fails:
                        raise Rollback
            except Rollback:
                self.assertNames()
        self.assertNames(*self.expected)

    def test_a_receiver_that_fails(self):
        """It fails in its own block only, unless the sender does, too."""

        async def failing(**kwargs):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="failing")
                raise ValueError

        self.signal.connect(failing)

        async def work():
            responses = dict(await self.signal.asend_robust(self))
            self.assertIsInstance(responses[failing], ValueError)

        self.assertInside(work, self.expected)

    def test_durable_in_receivers(self):
        signal = Signal()

        def receiver(**kwargs):
            with transaction.atomic(durable=True):
                self.fail("The block was entered.")

        async def areceiver(**kwargs):
            async with transaction.aatomic(durable=True):
                self.fail("The block was entered.")

        signal.connect(receiver)
        signal.connect(areceiver)

        async def work():
            for responses in (
                await signal.asend_robust(self),
                await sync_to_async(signal.send_robust)(self),
            ):
                for _, response in responses:
                    self.assertIsInstance(response, RuntimeError)
            await Entry.objects.acreate(name="usable")

        self.assertInside(work, ["usable"])


class ModelTests(BothColoursTestCase):
    available_apps = ["async_transactions", "django.contrib.contenttypes"]

    def test_model_signals(self):
        def before(instance, **kwargs):
            if instance.name == "sent":
                create("pre_save")

        def after(instance, **kwargs):
            if instance.name == "sent":
                with transaction.atomic():
                    create("post_save")

        async def aafter(instance, **kwargs):
            if instance.name == "sent":
                async with transaction.aatomic():
                    await Entry.objects.acreate(name="async post_save")

        for signal, receiver in (
            (pre_save, before),
            (post_save, after),
            (post_save, aafter),
        ):
            signal.connect(receiver, sender=Entry)
            self.addCleanup(signal.disconnect, receiver, sender=Entry)
        self.assertInside(
            lambda: Entry.objects.acreate(name="sent"),
            ["sent", "pre_save", "post_save", "async post_save"],
        )

    def test_deletion_signals(self):
        async def receiver(instance, **kwargs):
            if instance.name == "deleted":
                await Entry.objects.acreate(name="post_delete")

        async def work():
            entry = await Entry.objects.acreate(name="deleted")
            await entry.adelete()

        post_delete.connect(receiver, sender=Entry)
        self.addCleanup(post_delete.disconnect, receiver, sender=Entry)
        self.assertInside(work, ["post_delete"])

    def test_overridden_methods_and_fields(self):
        async def work():
            tag = await Tag.objects.acreate(name="tag")
            # The field has seen what save() wrote.
            self.assertEqual(tag.entries, 1)
            await tag.adelete()

        self.assertInside(work, ["save() of tag", "delete() of tag"])
        self.assertIs(Tag.objects.exists(), False)

    def test_on_delete(self):
        async def work():
            parent = await Tag.objects.acreate(name="parent")
            await Tag.objects.acreate(name="child", parent=parent)
            await Tag.objects.filter(name="parent").adelete()
            self.assertIs(await Tag.objects.aexists(), False)

        self.assertInside(
            work, ["save() of parent", "save() of child", "on_delete of child"]
        )

    def test_generic_relations(self):
        async def work():
            entry = await Entry.objects.acreate(name="entry")
            # Content types may be cached from before the block.
            ContentType.objects.clear_cache()
            await sync_to_async(lambda: entry.tags.create(name="tag"))()
            ContentType.objects.clear_cache()
            tag = await Tag.objects.aget()
            self.assertEqual(await sync_to_async(lambda: tag.content_object)(), entry)
            async for tag in Tag.objects.prefetch_related("content_object"):
                self.assertEqual(tag.content_object, entry)
            await sync_to_async(prefetch_related_objects)([entry], "tags")
            self.assertEqual(entry.tags.all()[0], tag)
            await Tag.objects.all().adelete()

        self.assertInside(work, ["entry", "save() of tag"])


class QueryingRouter:
    """Write tags to the database that an entry names."""

    def db_for_write(self, model, **hints):
        if model is Tag and Entry.objects.using("default").filter(name="other"):
            return "other"

    db_for_read = db_for_write


@override_settings(DATABASE_ROUTERS=[QueryingRouter()])
class RouterTests(BothColoursTestCase):
    databases = {"default", "other"}
    available_apps = ["async_transactions", "django.contrib.contenttypes"]

    async def write(self):
        """The router sees what the transaction hasn't committed."""
        await Tag.objects.acreate(name="in default")
        await Entry.objects.acreate(name="other")
        await Tag.objects.acreate(name="in other")

    async def write_in_threads(self):
        await self.write()
        await asyncio.to_thread(Tag.objects.create, name="in other, thread")

    in_default = ["in default"]
    in_other = ["in other", "in other, thread"]

    def assertTags(self, in_default, in_other):
        for alias, expected in (("default", in_default), ("other", in_other)):
            found = Tag.objects.using(alias).values_list("name", flat=True)
            self.assertEqual(sorted(found), expected)

    def clean(self):
        for alias in self.databases:
            for model in (Tag, Entry):
                model.objects.using(alias).delete()

    async def in_aatomic(self, fails):
        async with transaction.aatomic(), transaction.aatomic("other"):
            await self.write_in_threads()
            if fails:
                raise Rollback

    async def in_aatomic_reversed(self, fails):
        async with transaction.aatomic("other"), transaction.aatomic():
            await self.write_in_threads()
            if fails:
                raise Rollback

    def in_atomic(self, fails):
        with transaction.atomic(), transaction.atomic("other"):
            async_to_sync(self.write_in_threads)()
            if fails:
                raise Rollback

    def in_both(self, fails):
        async def inner():
            async with transaction.aatomic("other"):
                await self.write_in_threads()
            if fails:
                raise Rollback

        with transaction.atomic("other"), transaction.atomic():
            asyncio.run(inner())

    def test_two_databases(self):
        for run in (
            async_to_sync(self.in_aatomic),
            async_to_sync(self.in_aatomic_reversed),
            self.in_atomic,
            self.in_both,
        ):
            with self.subTest(run):
                with self.assertRaises(Rollback):
                    run(fails=True)
                self.assertTags([], [])
                run(fails=False)
                self.assertTags(self.in_default, self.in_other)
                self.clean()

    def test_one_of_two_databases(self):
        """What is routed to the other one isn't inside."""

        async def work():
            async with transaction.aatomic("other"):
                await self.write()
                raise Rollback

        with self.assertRaises(Rollback):
            async_to_sync(work)()
        self.assertTags(self.in_default, [])
        self.clean()


@unittest.skipUnless(find_spec("channels"), "Needs channels.")
class ChannelsTests(BothColoursTestCase):
    """
    database_sync_to_async() closes old connections before and after the
    function. The block's isn't one of them.
    """

    def setUp(self):
        super().setUp()
        from channels.db import aclose_old_connections, database_sync_to_async

        self.close_old_connections = aclose_old_connections
        self.database_sync_to_async = database_sync_to_async
        # Connections get old at once.
        settings = connections.settings["default"]
        self.addCleanup(settings.update, CONN_MAX_AGE=settings["CONN_MAX_AGE"])
        settings["CONN_MAX_AGE"] = 0

    def block(self, name):
        with transaction.atomic():
            create(name)

    def test_inside(self):
        def note(name):
            used.append(transaction.get_connection().connection)
            create(name)

        async def work():
            used.clear()
            await Entry.objects.acreate(name="before")
            await self.database_sync_to_async(note)("a")
            await self.database_sync_to_async(self.block)("b")
            await self.close_old_connections()
            await asyncio.gather(
                *(self.database_sync_to_async(note)(f"{number}") for number in range(3))
            )
            await Entry.objects.acreate(name="after")
            # All of them are the transaction's, still open.
            self.assertEqual(len(set(used)), 1)

        used = []
        self.assertInside(work, ["before", "a", "b", "0", "1", "2", "after"])

    def test_fails_inside(self):
        def fail():
            with transaction.atomic():
                create("rolled back")
                raise ValueError

        async def work():
            with self.assertRaises(ValueError):
                await self.database_sync_to_async(fail)()
            await Entry.objects.acreate(name="after")

        self.assertInside(work, ["after"])

    def test_back_to_async(self):
        async def inner():
            async with transaction.aatomic():
                await self.database_sync_to_async(create)("inner")

        self.assertInside(
            lambda: self.database_sync_to_async(async_to_sync(inner))(), ["inner"]
        )

    async def test_foreign_task(self):
        """It closes its own connection, not that of a block elsewhere."""
        inside = asyncio.Event()
        closed = asyncio.Event()

        async def foreign():
            await until(inside)
            task = asyncio.create_task(self.close_old_connections())
            await asyncio.wait([task], timeout=0.2)
            closed.set()
            await task

        task = asyncio.create_task(foreign())
        await asyncio.sleep(0)
        async with transaction.aatomic():
            await Entry.objects.acreate(name="before")
            inside.set()
            await until(closed)
            await Entry.objects.acreate(name="after")
        await task
        await self.assertAsyncNames("after", "before")
