"""
The asynchronous methods of the database cache.

Those of BaseCache call the synchronous ones in a thread, as most caches need
it. Where a database is used, it's done as asynchronous methods of the ORM do
it. Not in here are those which call others, unless a subclass overrides their
synchronous counterparts.
"""

from django.db.async_calls import sync_to_async


class AsyncDatabaseCache:
    async def aadd(self, *args, **kwargs):
        return await sync_to_async(self.add)(*args, **kwargs)

    async def aget(self, *args, **kwargs):
        return await sync_to_async(self.get)(*args, **kwargs)

    async def aset(self, *args, **kwargs):
        return await sync_to_async(self.set)(*args, **kwargs)

    async def atouch(self, *args, **kwargs):
        return await sync_to_async(self.touch)(*args, **kwargs)

    async def adelete(self, *args, **kwargs):
        return await sync_to_async(self.delete)(*args, **kwargs)

    async def aget_many(self, *args, **kwargs):
        return await sync_to_async(self.get_many)(*args, **kwargs)

    async def ahas_key(self, *args, **kwargs):
        return await sync_to_async(self.has_key)(*args, **kwargs)

    async def adelete_many(self, *args, **kwargs):
        return await sync_to_async(self.delete_many)(*args, **kwargs)

    async def aclear(self):
        return await sync_to_async(self.clear)()

    async def aclose(self, **kwargs):
        # There's nothing to close.
        self.close(**kwargs)
