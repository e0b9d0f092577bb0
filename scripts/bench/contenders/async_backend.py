"""
django-async-backend: a copy of Django's ORM, made asynchronous.

A task keeps its connection until a request ends, when its receiver of
Django's signals closes it. So that's done after each call, or 10 tasks would
be all that a pool of 10 can serve.
"""

import asyncio
from functools import wraps

from operations import BULK_SIZE, LIST_SIZE, SLEEP

from . import django_models


def in_request(method):
    @wraps(method)
    async def inner(self, *args):
        from django_async_backend.db import close_old_async_connections

        try:
            return await method(self, *args)
        finally:
            await close_old_async_connections()

    return inner


class Contender:
    def __init__(self, url):
        django_models.configure(
            url,
            engine="django_async_backend.db.backends.postgresql",
            apps=["django_async_backend"],
            OPTIONS={"pool": {"timeout": 120}},
        )
        from django_async_backend.db.models.manager import AsyncManager

        self.models = django_models.models(AsyncManager)

    async def open(self, pool_size):
        # In a task of its own: those of the measurement would inherit its
        # connection, and be refused.
        await asyncio.create_task(self._open(pool_size))

    async def close(self):
        await asyncio.create_task(self._close())

    @staticmethod
    async def _open(pool_size):
        from django_async_backend.db import async_connections

        connection = async_connections["default"]
        pool = connection.settings_dict["OPTIONS"]["pool"]
        pool["min_size"] = pool["max_size"] = pool_size
        await connection.pool.open(wait=True)

    @staticmethod
    async def _close():
        from django_async_backend.db import async_connections

        await async_connections["default"].close_pool()

    @in_request
    async def get(self, key):
        return await self.models.Item.async_objects.aget(pk=key)

    @in_request
    async def slow_get(self, key):
        return await self.models.SlowItem.async_objects.aget(pk=key)

    @in_request
    async def list(self, start):
        items = self.models.Item.async_objects.filter(
            pk__gte=start, pk__lt=start + LIST_SIZE
        )
        return [item async for item in items.order_by("pk")]

    @in_request
    async def transaction(self, key):
        await self._transaction(self.models.Account, key)

    @in_request
    async def slow_transaction(self, key):
        await self._transaction(self.models.SlowAccount, key)

    async def _transaction(self, model, key):
        from django_async_backend.db.transaction import async_atomic

        async with async_atomic():
            account = await model.async_objects.select_for_update().aget(pk=key)
            account.balance += 1
            await account.async_save(update_fields=["balance"])
            await self.models.Entry.async_objects.acreate(account_id=key, amount=1)

    @in_request
    async def bulk(self, key):
        entries = [
            self.models.Entry(account_id=key, amount=1) for _ in range(BULK_SIZE)
        ]
        await self.models.Entry.async_objects.abulk_create(entries)

    @in_request
    async def sleep(self):
        from django_async_backend.db import async_connections

        async with await async_connections["default"].cursor() as cursor:
            await cursor.execute("SELECT pg_sleep(%s)", [SLEEP])
