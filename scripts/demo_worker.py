"""
Answer the forum's questions with the Django that is installed.

    python scripts/demo_worker.py
    python scripts/demo_worker.py --native
    python scripts/demo_worker.py --async-backend

demo.py starts this with stock Django, with django-async-backend, with the
fork, and with the fork in native mode. It uses the server that DATABASE_URL
names, creates one table there and drops it. The output is a JSON object: the
versions, for each question what was observed and whether the fork's promise
was kept, and what many concurrent transactions cost.

Exit codes: 0 if all questions were answered, 2 if the server does not answer.
"""

import asyncio
import contextlib
import importlib.metadata
import inspect
import json
import os
import sys
import threading
import time

import postgres
import psycopg
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from own_server import ServerError

import django
from django.conf import settings
from django.db import connection, connections, models, transaction

APPLICATION_NAME = f"demo-{os.getpid()}"
TIMEOUT = 20

# How many transactions there are at once, and how long each one takes, in
# seconds. They share a pool.
TRANSACTIONS = 100
DURATION = 0.05
POOL_SIZE = 20

# Seconds between two looks at the event loop.
INTERVAL = 0.001


class AsyncAtomicContextManager(transaction.Atomic):
    """The forum's recipe: atomic() for "async with", by sync_to_async()."""

    def __init__(self, using=None, savepoint=True, durable=False):
        super().__init__(using, savepoint, durable)

    async def __aenter__(self):
        await sync_to_async(super().__enter__)()

    async def __aexit__(self, exc_type, exc_value, traceback):
        await sync_to_async(super().__exit__)(exc_type, exc_value, traceback)


class Rollback(Exception):
    """What the blocks below fail with."""


class Observer:
    """Look at the database through a connection that Django does not know."""

    def __init__(self, url):
        self.connection = psycopg.connect(url, autocommit=True)

    def column(self, sql, *params):
        """Return the first column of a query's result as a set."""
        return {row[0] for row in self.connection.execute(sql, params)}

    def names(self):
        """Return the names of the committed entries."""
        return self.column(f"SELECT name FROM {Entry._meta.db_table}")

    def open_transactions(self):
        """Return the backends on which Django has a transaction open."""
        return self.column(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s "
            "AND state LIKE 'idle in transaction%%'",
            APPLICATION_NAME,
        )


def backend():
    """Return the number of the backend that serves the caller."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


class Stock:
    """What stock Django has to offer to asynchronous code."""

    packages = ["Django"]
    settings = {}
    database = {}
    block = AsyncAtomicContextManager
    backend = staticmethod(sync_to_async(backend))

    @property
    def entries(self):
        return Entry.objects

    async def open_pool(self):
        connections["pooled"].pool.open(wait=True)

    async def close_pool(self):
        connections["pooled"].close_pool()

    async def transaction(self):
        await sync_to_async(sleep_in_transaction)()


class Fork(Stock):
    @property
    def block(self):
        return transaction.aatomic

    async def transaction(self):
        async with self.block(using="pooled"):
            await django.db.run_sync(sleep_in_database)


class AsyncBackend:
    """django-async-backend, which can't be imported before it's configured."""

    packages = ["Django", "django-async-backend"]
    settings = {"INSTALLED_APPS": ["django_async_backend"]}
    database = {"ENGINE": "django_async_backend.db.backends.postgresql"}

    @property
    def block(self):
        from django_async_backend.db.transaction import async_atomic

        return async_atomic

    @property
    def entries(self):
        return Entry.async_objects

    async def backend(self):
        return await self.value("default", "SELECT pg_backend_pid()")

    async def open_pool(self):
        from django_async_backend.db import async_connections

        await async_connections["pooled"].pool.open(wait=True)

    async def close_pool(self):
        from django_async_backend.db import async_connections

        await async_connections["pooled"].close_pool()

    async def transaction(self):
        from django_async_backend.db import close_old_async_connections

        try:
            async with self.block(using="pooled"):
                await self.value("pooled", "SELECT pg_sleep(%s)", [DURATION])
        finally:
            await close_old_async_connections()

    async def value(self, alias, sql, params=None):
        from django_async_backend.db import async_connections

        async with await async_connections[alias].cursor() as cursor:
            await cursor.execute(sql, params)
            return (await cursor.fetchone())[0]


# What is asked. main() decides.
offer = Fork() if hasattr(transaction, "aatomic") else Stock()


async def two_tasks(observer):
    """
    1. Are synchronous connections a design decision? Can two tasks be in a
    transaction each?
    """
    first_is_open, second_is_closed = asyncio.Event(), asyncio.Event()
    backends = []

    async def first():
        async with offer.block():
            backends.append(await offer.backend())
            first_is_open.set()
            await second_is_closed.wait()

    async def second():
        await first_is_open.wait()
        async with offer.block():
            backends.append(await offer.backend())
            transactions = observer.open_transactions()
        second_is_closed.set()
        return transactions

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(first())
        result = tasks.create_task(second())
    transactions = result.result()
    kept = backends[0] != backends[1] and transactions == set(backends)
    return kept, (
        f"The tasks' blocks run on backends {backends[0]} and {backends[1]}, "
        f"transactions open at once: {len(transactions)}."
    )


async def other_thread(observer):
    """
    2. Why are connections bound to threads? Does a block cover the code it
    runs with asyncio.to_thread()?
    """

    def work():
        Entry.objects.create(name="thread")
        return backend()

    with contextlib.suppress(Rollback):
        async with offer.block():
            of_block = await offer.backend()
            of_thread = await asyncio.to_thread(work)
            raise Rollback
    survived = "thread" in observer.names()
    return of_thread == of_block and not survived, (
        f"The block runs on backend {of_block}, the thread on {of_thread}. "
        + outcome("The thread's row", survived)
    )


def loop_in_atomic(observer, start):
    """Create a row in a coroutine below atomic()."""

    async def work():
        await offer.entries.acreate(name="coroutine")
        return await offer.backend()

    with contextlib.suppress(Rollback), transaction.atomic():
        of_block = backend()
        of_coroutine = start(work)
        raise Rollback
    survived = "coroutine" in observer.names()
    return of_coroutine == of_block and not survived, (
        f"The block runs on backend {of_block}, the coroutine on {of_coroutine}. "
        + outcome("The coroutine's row", survived)
    )


def new_loop(observer):
    """
    3. Is an event loop that is started in atomic() inside the block, with
    asyncio.run()?
    """
    return loop_in_atomic(observer, lambda work: asyncio.run(work()))


def loop_of_asgiref(observer):
    """
    3. Is a coroutine inside the block that atomic() calls through
    async_to_sync()?
    """
    return loop_in_atomic(observer, lambda work: async_to_sync(work)())


async def overlapping_blocks(observer):
    """
    4. Does AsyncAtomicContextManager behave? If two blocks overlap, does each
    end on its own?
    """
    first_wrote, second_wrote, first_failed = (asyncio.Event() for _ in range(3))

    async def first():
        with contextlib.suppress(Rollback):
            async with offer.block():
                await offer.entries.acreate(name="failed")
                first_wrote.set()
                await second_wrote.wait()
                raise Rollback
        first_failed.set()

    async def second():
        await first_wrote.wait()
        async with offer.block():
            await offer.entries.acreate(name="successful")
            second_wrote.set()
            await first_failed.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(first())
        tasks.create_task(second())
    names = observer.names()
    return names == {"successful"}, (
        f"With {offer.block.__name__}: "
        + outcome("the failed block's row", "failed" in names)
        + outcome(" The successful block's row", "successful" in names)
    )


async def race(observer):
    """
    5. The race: if an older task wakes up between a block's "does it exist?"
    and "create", is it outside the block?
    """
    touched, checked, wrote, created, read = (asyncio.Event() for _ in range(5))

    async def older_task():
        await offer.entries.acount()
        touched.set()
        await checked.wait()
        of_task = await offer.backend()
        await offer.entries.acreate(name="task")
        wrote.set()
        await created.wait()
        seen = await offer.entries.filter(name="block").aexists()
        read.set()
        return of_task, seen

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(older_task())
        await touched.wait()
        with contextlib.suppress(Rollback):
            async with offer.block():
                of_block = await offer.backend()
                if not await offer.entries.filter(name="block").aexists():
                    checked.set()
                    await wrote.wait()
                    await offer.entries.acreate(name="block")
                    created.set()
                    await read.wait()
                raise Rollback
    of_task, seen = task.result()
    names = observer.names()
    return of_task != of_block and not seen and names == {"task"}, (
        f"The block runs on backend {of_block}, the task on {of_task}. It "
        f"{'sees' if seen else 'does not see'} the block's uncommitted row. "
        + outcome("The task's row", "task" in names)
    )


async def own_tasks(observer):
    """Does a block cover the tasks that it starts with gather()?"""
    with contextlib.suppress(Rollback):
        async with offer.block():
            of_block = await offer.backend()
            of_task, _ = await asyncio.gather(
                offer.backend(), offer.entries.acreate(name="task")
            )
            raise Rollback
    survived = "task" in observer.names()
    return of_task == of_block and not survived, (
        f"The block runs on backend {of_block}, its task on {of_task}. "
        + outcome("The task's row", survived)
    )


async def overridden_save(observer):
    """Does acreate() call a save() method that the model overrides?"""
    entry = await offer.entries.acreate(name="entry")
    called = entry.saved and "entry" in observer.names()
    return called, f"It {'is' if called else 'is not'} called."


def outcome(row, exists):
    """Tell what became of a row."""
    return f"{row} {'is committed' if exists else 'is rolled back'}."


QUESTIONS = [
    two_tasks,
    other_thread,
    new_loop,
    loop_of_asgiref,
    overlapping_blocks,
    race,
    own_tasks,
    overridden_save,
]


def answer(question, observer):
    """Return a question, what was observed, and whether it is as promised."""
    observer.connection.execute(f"TRUNCATE {Entry._meta.db_table}")
    try:
        if inspect.iscoroutinefunction(question):
            coroutine = asyncio.wait_for(question(observer), TIMEOUT)
            kept, observed = asyncio.run(coroutine)
        else:
            kept, observed = question(observer)
    except Exception as error:
        kept, observed = False, f"{type(error).__name__}: {error}"
    return {
        "question": " ".join(question.__doc__.split()),
        "kept": kept,
        "observed": observed,
    }


class Meter:
    """
    Measure the time, the event loop's longest stall, and how many threads
    there are at a time, its own included, besides those that were there.
    """

    async def __aenter__(self):
        self.stall, self.threads = 0, 1
        self.others = threading.active_count() - 1
        self.watcher = asyncio.create_task(self.watch())
        await asyncio.sleep(INTERVAL)
        self.start = time.monotonic()
        return self

    async def watch(self):
        while True:
            before = time.monotonic()
            await asyncio.sleep(INTERVAL)
            self.stall = max(self.stall, time.monotonic() - before - INTERVAL)
            self.threads = max(self.threads, threading.active_count() - self.others)

    async def __aexit__(self, *exc_info):
        self.seconds = time.monotonic() - self.start
        # The watcher has yet to see the end.
        await asyncio.sleep(2 * INTERVAL)
        self.watcher.cancel()


def sleep_in_database():
    """Run a query that takes the time of a transaction."""
    with connections["pooled"].cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", [DURATION])


def sleep_in_transaction():
    """Do so with stock Django, as its documentation recommends."""
    try:
        with transaction.atomic(using="pooled"):
            sleep_in_database()
    finally:
        # The ASGI handler does it at the end of a request.
        connections["pooled"].close()


async def request():
    """Be a request that consists of a transaction."""
    # The ASGI handler gives each request a thread for synchronous code.
    async with ThreadSensitiveContext():
        await offer.transaction()


async def many_requests():
    # In tasks of their own, since django-async-backend's connections are
    # inherited, but belong to a task.
    await asyncio.create_task(offer.open_pool())
    try:
        # What is done once doesn't count.
        await asyncio.create_task(request())
        async with Meter() as meter:
            async with asyncio.timeout(TIMEOUT), asyncio.TaskGroup() as tasks:
                for _ in range(TRANSACTIONS):
                    tasks.create_task(request())
    finally:
        await asyncio.create_task(offer.close_pool())
    return meter


def measure(native):
    """Return what concurrent transactions cost, and whether as promised."""
    meter = asyncio.run(many_requests())
    # One after the other, they would take longer.
    kept = meter.seconds < TRANSACTIONS * DURATION
    return {
        "title": (
            f"{TRANSACTIONS} concurrent transactions of {DURATION * 1000:.0f} ms each, "
            f"in as many requests, on a pool of {POOL_SIZE} connections"
        ),
        "seconds": meter.seconds,
        "threads": meter.threads,
        "stall": meter.stall,
        "kept": kept and (meter.threads == 1 or not native),
    }


def configure(database, native):
    """Set Django up for one table."""
    global Entry

    database |= offer.database
    database["OPTIONS"] |= {
        "application_name": APPLICATION_NAME,
        # A lock that is never released must not look like patience.
        "options": f"-c lock_timeout={TIMEOUT}s",
    }
    database["ASYNC_NATIVE"] = native
    pool = {"min_size": POOL_SIZE, "max_size": POOL_SIZE, "timeout": TIMEOUT}
    pooled = {**database, "OPTIONS": {**database["OPTIONS"], "pool": pool}}
    databases = {"default": database, "pooled": pooled}
    settings.configure(DATABASES=databases, **offer.settings)
    django.setup()

    class Entry(models.Model):
        name = models.CharField(max_length=20, unique=True)
        saved = False

        class Meta:
            app_label = "demo"
            # The server may be somebody's, and used by two demos.
            db_table = f"aatomic_demo_{os.getpid()}"

        def save(self, **kwargs):
            super().save(**kwargs)
            self.saved = True


def main(arguments):
    """Answer the questions; return the exit code."""
    global offer

    url = os.environ["DATABASE_URL"]
    native = arguments == ["--native"]
    if arguments == ["--async-backend"]:
        offer = AsyncBackend()
    try:
        configure(postgres.database_settings(url), native)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 2
    with connection.schema_editor() as editor:
        editor.create_model(Entry)
    observer = Observer(url)
    try:
        answers = [answer(question, observer) for question in QUESTIONS]
        load = measure(native)
    finally:
        observer.connection.execute(f"DROP TABLE {Entry._meta.db_table}")
    version = observer.connection.info.server_version
    result = {
        "packages": [
            f"{name} {importlib.metadata.version(name)}" for name in offer.packages
        ],
        "python": ".".join(map(str, sys.version_info[:3])),
        "postgresql": f"{version // 10000}.{version % 10000}",
        "answers": answers,
        "load": load,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
