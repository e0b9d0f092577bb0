"""
The project that the servers in test_servers.py serve.

It's imported by their processes only. The settings that depend on the test run
come from the environment.
"""

import asyncio
import json
import os
from collections import Counter

from asgiref.sync import async_to_sync, sync_to_async

import django
from django.conf import settings

settings.configure(
    **json.loads(os.environ["ASYNC_TRANSACTIONS_SETTINGS"]),
    ALLOWED_HOSTS=["*"],
    INSTALLED_APPS=["django.contrib.contenttypes", "async_transactions"],
    LOGGING={
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"console": {"class": "logging.StreamHandler"}},
        "root": {"handlers": ["console"]},
    },
    ROOT_URLCONF=__name__,
    SECRET_KEY="tests",
    USE_TZ=False,
)
django.setup()

from django.core.handlers.asgi import ASGIHandler  # NOQA: E402
from django.db import connections, transaction  # NOQA: E402
from django.db.backends.signals import connection_created  # NOQA: E402
from django.db.transaction import aatomic  # NOQA: E402
from django.http import (  # NOQA: E402
    HttpResponse,
    JsonResponse,
    StreamingHttpResponse,
)
from django.test import override_settings  # NOQA: E402
from django.urls import path  # NOQA: E402

from .models import Entry  # NOQA: E402

LONG_QUERIES = {
    "postgresql": "SELECT pg_sleep(60)",
    "sqlite": (
        "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers) "
        "SELECT count(*) FROM numbers"
    ),
}

# How many connections this process has opened, by alias.
opened = Counter()


def count_opened(connection, **kwargs):
    opened[connection.alias] += 1


connection_created.connect(count_opened, weak=False)


class Failure(Exception):
    pass


# ##### What the views do #####


def entries(request):
    return Entry.objects.using(request.GET.get("using", "default"))


def sessions(alias):
    """Return how many sessions for the alias the database server sees."""
    connection = connections[alias]
    if connection.vendor != "postgresql":
        return 0
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s",
            [connection.settings_dict["OPTIONS"]["application_name"]],
        )
        return cursor.fetchone()[0]


def long_query(alias):
    connection = connections[alias]
    with connection.cursor() as cursor:
        cursor.execute(LONG_QUERIES[connection.vendor])


async def started(request):
    """Tell the test how far the view is, outside of its block."""
    alias = "default" if entries(request).db == "other" else "other"
    await Entry.objects.using(alias).acreate(name="started")


# ##### Views #####


@transaction.non_atomic_requests
async def counts(request):
    """Touch no database."""
    pool = {}
    if "pooled" in connections:
        pool = connections["pooled"].pool.get_stats()
    return JsonResponse(
        {
            "opened": opened,
            "lent": pool.get("pool_size", 0) - pool.get("pool_available", 0),
        }
    )


async def blocks(request):
    most = 0
    for number in range(5):
        if "mixed" in request.GET:
            await entries(request).acount()
        async with aatomic(entries(request).db):
            await entries(request).acreate(name=f"{number}")
            most = max(most, await sync_to_async(sessions)(entries(request).db))
    return JsonResponse({"sessions": most})


async def aliases(request):
    await Entry.objects.acount()
    async with aatomic():
        await Entry.objects.acreate(name="outer")
        async with aatomic("other"):
            await Entry.objects.using("other").acreate(name="inner")
        await Entry.objects.using("persistent").acount()
    await Entry.objects.using("other").acount()
    async with aatomic("persistent"):
        await Entry.objects.using("persistent").acreate(name="persistent")
    return HttpResponse()


async def gathers(request):
    async def block(number):
        async with aatomic(entries(request).db):
            await entries(request).acreate(name=f"{number}")

    async with aatomic(entries(request).db):
        await entries(request).acreate(name="before")
    await asyncio.gather(
        *[block(number) for number in range(5)],
        *[entries(request).acount() for _ in range(5)],
    )
    return HttpResponse()


async def creates(request):
    if "mixed" in request.GET:
        await entries(request).acount()
    async with aatomic(entries(request).db):
        await entries(request).acreate(name=request.GET["name"])
    return HttpResponse()


async def fails(request):
    await entries(request).acreate(name="autocommit")
    async with aatomic(entries(request).db):
        await entries(request).acreate(name="fails")
        raise Failure


async def waits(request):
    await entries(request).acount()
    async with aatomic(entries(request).db):
        await entries(request).acreate(name="waits")
    await started(request)
    await asyncio.sleep(60)


async def waits_in_block(request):
    async with aatomic(entries(request).db):
        await entries(request).acreate(name="waits")
        await started(request)
        await asyncio.sleep(60)


async def queries_in_block(request):
    await entries(request).acount()
    async with aatomic(entries(request).db):
        await entries(request).acreate(name="waits")
        await started(request)
        await sync_to_async(long_query)(entries(request).db)


async def streams(request):
    async def content():
        yield f"{await entries(request).acount()}"
        async with aatomic(entries(request).db):
            await entries(request).acreate(name="first")
            yield f"{await entries(request).acount()}"
        async with aatomic(entries(request).db):
            await entries(request).acreate(name="second")
            yield f"{await entries(request).acount()}"
        yield f"{await entries(request).acount()}"

    return StreamingHttpResponse(content())


async def fails_streaming(request):
    async def content():
        await entries(request).acount()
        async with aatomic(entries(request).db):
            await entries(request).acreate(name="fails")
            yield "first"
            raise Failure

    return StreamingHttpResponse(content())


async def streams_forever(request):
    async def content():
        await entries(request).acount()
        async with aatomic(entries(request).db):
            await entries(request).acreate(name="streams")
            while True:
                yield "chunk"
                await asyncio.sleep(0.01)

    return StreamingHttpResponse(content())


async def streams_more_than_is_read(request):
    """Wait for the client rather than in here."""

    async def content():
        async with aatomic(entries(request).db):
            await entries(request).acreate(name="streams")
            while True:
                yield "chunk" * 200_000
                # Some servers don't suspend the task when nobody reads.
                await asyncio.sleep(0)

    return StreamingHttpResponse(content())


def sync(request):
    for number in range(5):
        entries(request).count()
        with transaction.atomic(using=entries(request).db):
            entries(request).create(name=f"{number}")
    return HttpResponse()


def sync_calls_async(request):
    entries(request).count()
    async_to_sync(blocks)(request)
    return HttpResponse()


@transaction.non_atomic_requests
async def non_atomic(request):
    await entries(request).acreate(name="non-atomic")
    raise Failure


async def says_whether_atomic(request):
    async def content():
        yield f" {transaction.get_connection().in_atomic_block}"
        await Entry.objects.acreate(name="content")

    await Entry.objects.acreate(name="view")
    in_atomic_block = transaction.get_connection().in_atomic_block
    return StreamingHttpResponse(chain(f"{in_atomic_block}", content()))


async def chain(first, rest):
    yield first
    async for part in rest:
        yield part


class Background:
    """A task that's started by one request and goes on in another."""

    task = None
    resumed = asyncio.Event()


async def starts_task(request):
    async def work():
        await Background.resumed.wait()
        await entries(request).acreate(name="autocommit")
        for number in range(3):
            async with aatomic(entries(request).db):
                await entries(request).acreate(name=f"{number}")

    await entries(request).acount()
    Background.task = asyncio.create_task(work())
    return HttpResponse()


async def awaits_task(request):
    Background.resumed.set()
    try:
        await asyncio.wait_for(Background.task, 20)
    finally:
        Background.resumed.clear()
        Background.task = None
    return HttpResponse()


urlpatterns = [
    path(f"{view.__name__}/", view)
    for view in [
        aliases,
        awaits_task,
        blocks,
        counts,
        creates,
        fails,
        fails_streaming,
        gathers,
        non_atomic,
        queries_in_block,
        says_whether_atomic,
        starts_task,
        streams,
        streams_forever,
        streams_more_than_is_read,
        sync,
        sync_calls_async,
        waits,
        waits_in_block,
    ]
]


# ##### Middleware #####


def sync_middleware(get_response):
    """Query every database on both ways."""

    def middleware(request):
        for alias in connections:
            Entry.objects.using(alias).count()
        response = get_response(request)
        for alias in connections:
            Entry.objects.using(alias).count()
        return response

    return middleware


def async_middleware(get_response):
    """Query every database on both ways, and in blocks."""

    async def middleware(request):
        for alias in connections:
            await Entry.objects.using(alias).acount()
        response = await get_response(request)
        for alias in connections:
            async with aatomic(alias):
                await Entry.objects.using(alias).acount()
        return response

    return middleware


async_middleware.sync_capable = False
async_middleware.async_capable = True


class HandlesExceptions:
    sync_capable = True
    async_capable = True

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        return self.get_response(request)

    def process_exception(self, request, exception):
        if isinstance(exception, Failure):
            return HttpResponse(f"{Entry.objects.count()}")


class Application:
    """Serve the URLs below a prefix with the middleware of that name."""

    middleware = {
        "plain": [],
        "sync": ["sync_middleware"],
        "async": ["async_middleware"],
        "both": ["async_middleware", "sync_middleware", "async_middleware"],
        "handles": ["HandlesExceptions"],
    }

    def __init__(self):
        self.handlers = {}
        for prefix, names in self.middleware.items():
            with override_settings(MIDDLEWARE=[f"{__name__}.{name}" for name in names]):
                self.handlers[prefix] = ASGIHandler()

    async def __call__(self, scope, receive, send):
        _, prefix, path = scope["path"].split("/", 2)
        await self.handlers[prefix]({**scope, "path": f"/{path}"}, receive, send)


application = Application()
