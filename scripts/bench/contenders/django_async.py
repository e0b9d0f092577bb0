"""
Django's asynchronous ORM: stock Django's, and the fork's in either mode.

In threads, each call is what a request is for Django's ASGI handler. Else all
tasks would work in one thread. At the end of a request, the ASGI handler has
its connections closed, which returns them to the pool.

In native mode, the tasks call the ORM, and that's it.
"""

from contextlib import asynccontextmanager
from functools import wraps

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from operations import AUTHORS_READ, BULK_SIZE, LIST_SIZE, SLEEP

from . import django_models


@asynccontextmanager
async def stock_request():
    from django.db import close_old_connections

    async with ThreadSensitiveContext():
        try:
            yield
        finally:
            await sync_to_async(close_old_connections)()


def in_request(method):
    @wraps(method)
    async def inner(self, *args):
        if self.request is None:
            return await method(self, *args)
        async with self.request():
            return await method(self, *args)

    return inner


class Contender:
    def __init__(self, url, mode):
        self.mode = mode
        database = {"OPTIONS": {"pool": {"timeout": 120}}}
        if mode == "native":
            database["ASYNC_NATIVE"] = True
        django_models.configure(url, **database)
        self.models = django_models.models()
        self.blocks = mode == "stock"
        self.request = None
        if mode == "stock":
            self.request = stock_request
            # It refuses asynchronous views there.
            self.http_atomic = None
        elif mode == "thread":
            from django.db.life_cycle import request_scope

            self.request = request_scope

    async def open(self, pool_size, min_size=None):
        from django.db import connection

        pool = connection.settings_dict["OPTIONS"]["pool"]
        pool["min_size"] = pool_size if min_size is None else min_size
        pool["max_size"] = pool_size
        await sync_to_async(self._open)()

    @staticmethod
    def _open():
        from django.db import connection

        connection.pool.open(wait=True)

    async def close(self):
        from django.db import connection

        await sync_to_async(connection.close_pool)()

    def http(self):
        """Return an ASGI application with a view at /http/KEY."""
        from .django_http import application

        return application(self.models.Item)

    def http_atomic(self):
        """Return one with a view that's a transaction at /http_atomic/KEY."""
        return self.http()

    @in_request
    async def get(self, key):
        return await self.models.Item.objects.aget(pk=key)

    @in_request
    async def slow_get(self, key):
        return await self.models.SlowItem.objects.aget(pk=key)

    @in_request
    async def list(self, start):
        items = self.models.Item.objects.filter(pk__gte=start, pk__lt=start + LIST_SIZE)
        return [item async for item in items.order_by("pk")]

    @in_request
    async def transaction(self, key):
        await self._transaction(self.models.Account, key)

    @in_request
    async def slow_transaction(self, key):
        await self._transaction(self.models.SlowAccount, key)

    async def _transaction(self, model, key):
        if self.mode == "stock":
            # As Django's documentation says.
            await sync_to_async(self._transaction_in_thread)(model, key)
            return
        from django.db import transaction

        async with transaction.aatomic():
            account = await model.objects.select_for_update().aget(pk=key)
            account.balance += 1
            await account.asave(update_fields=["balance"])
            await self.models.Entry.objects.acreate(account_id=key, amount=1)

    def _transaction_in_thread(self, model, key):
        from django.db import transaction

        with transaction.atomic():
            account = model.objects.select_for_update().get(pk=key)
            account.balance += 1
            account.save(update_fields=["balance"])
            self.models.Entry.objects.create(account_id=key, amount=1)

    @in_request
    async def hold(self, key, wait):
        if self.blocks:
            await sync_to_async(self._hold_in_thread)(key, wait)
            return
        from django.db import transaction

        async with transaction.aatomic():
            await self.models.Account.objects.select_for_update().aget(pk=key)
            await wait()

    def _hold_in_thread(self, key, wait):
        from django.db import transaction

        with transaction.atomic():
            self.models.Account.objects.select_for_update().get(pk=key)
            wait()

    @in_request
    async def prefetch(self, start):
        authors = self.models.Author.objects.filter(
            pk__gte=start, pk__lt=start + AUTHORS_READ
        )
        authors = authors.order_by("pk").prefetch_related("books", "awards")
        return [
            (author, list(author.books.all()), list(author.awards.all()))
            async for author in authors
        ]

    @in_request
    async def bulk(self, key):
        entries = [
            self.models.Entry(account_id=key, amount=1) for _ in range(BULK_SIZE)
        ]
        await self.models.Entry.objects.abulk_create(entries)

    @in_request
    async def stream(self):
        count = total = 0
        async for item in self.models.Item.objects.aiterator(chunk_size=2000):
            count += 1
            total += item.pk
        return count, total

    @in_request
    async def sleep(self):
        if self.mode == "stock":
            await sync_to_async(self._sleep_in_thread)()
            return
        from django.db import connection

        async with connection.acursor() as cursor:
            await cursor.execute("SELECT pg_sleep(%s)", [SLEEP])

    @staticmethod
    def _sleep_in_thread():
        from django.db import connection

        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(%s)", [SLEEP])
