"""
Promises 11 and 12, as in test_orm, for the cache in the database and for
sessions, which may be in that cache.
"""

from django.contrib.sessions.backends import cached_db, db
from django.core.cache.backends.db import DatabaseCache
from django.core.management import call_command
from django.db import connection
from django.test import override_settings

from .test_orm import InventoryTestCase

TABLE = "async_bridge_cache"


@override_settings(
    CACHES={
        "default": {
            "BACKEND": "django.core.cache.backends.db.DatabaseCache",
            "LOCATION": TABLE,
        }
    }
)
class CacheInventoryTests(InventoryTestCase):
    def setUp(self):
        super().setUp()
        call_command("createcachetable")
        self.addCleanup(self.drop_table)

    def drop_table(self):
        with connection.schema_editor() as editor:
            editor.execute(f"DROP TABLE {TABLE}")

    async def test_cache(self):
        cache = DatabaseCache(TABLE, {})
        await self.check(
            DatabaseCache,
            {
                "aadd": lambda: cache.aadd("key", 1),
                "aget": lambda: cache.aget("key"),
                "aget_many": lambda: cache.aget_many(["key"]),
                "aget_or_set": lambda: cache.aget_or_set("other", 2),
                "ahas_key": lambda: cache.ahas_key("key"),
                "aincr": lambda: cache.aincr("key"),
                "adecr": lambda: cache.adecr("key"),
                "aincr_version": lambda: cache.aincr_version("key"),
                "adecr_version": lambda: cache.adecr_version("key", version=2),
                "aset": lambda: cache.aset("key", 3),
                "aset_many": lambda: cache.aset_many({"key": 4}),
                "atouch": lambda: cache.atouch("key"),
                "adelete": lambda: cache.adelete("key"),
                "adelete_many": lambda: cache.adelete_many(["other"]),
                "aclear": cache.aclear,
                "aclose": cache.aclose,
            },
            without_query={"aclose"},
        )

    def session_calls(self, session_class):
        """
        Each on a session that was saved and has to be loaded. Those that don't
        load it are given last.
        """

        def call(name, *args):
            async def inner():
                session = session_class()
                await session.aset("key", "value")
                await session.asave()
                session = session_class(session.session_key)
                await getattr(session, name)(*args)

            return inner

        calls = {
            name: call(name)
            for name in (
                "acreate adelete aflush acycle_key aload asave aitems akeys avalues "
                "aget_expiry_age aget_expiry_date aget_expire_at_browser_close "
                "aset_test_cookie atest_cookie_worked"
            ).split()
        }
        for name in ("aget", "ahas_key", "apop", "aexists"):
            calls[name] = call(name, "key")
        for name, arg in (("aset_expiry", 1), ("aupdate", {})):
            calls[name] = call(name, arg)
        for name in ("aset", "asetdefault"):
            calls[name] = call(name, "key", 1)

        async def test_cookie():
            session = session_class()
            await session.aset_test_cookie()
            await session.adelete_test_cookie()
            await session.asave()

        calls["adelete_test_cookie"] = test_cookie
        calls["acreate_model_instance"] = call("acreate_model_instance", {})
        calls["aclear_expired"] = session_class.aclear_expired
        return calls

    async def test_database_sessions(self):
        await self.check(db.SessionStore, self.session_calls(db.SessionStore))

    async def test_cached_database_sessions(self):
        calls = self.session_calls(cached_db.SessionStore)
        calls["acache_key"] = lambda: cached_db.SessionStore("a" * 32).acache_key()
        await self.check(cached_db.SessionStore, calls, {"acache_key"})
