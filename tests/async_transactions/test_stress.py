"""
Promises 1, 3, 6 and 7: what random tasks have committed is what's in the
database, each block as a whole or not at all.
"""

import asyncio
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

from asgiref.sync import async_to_sync, sync_to_async

from django.db import connection, transaction

from .base import AsyncTransactionTestCase, Rollback, create
from .interruptions import Interruption
from .models import Entry

SEEDS = 3
TASKS = 30


def create_in_block(name, fail=False):
    with transaction.atomic():
        create(name)
        if fail:
            raise Rollback


class Job:
    """A transaction that does random things, and what it should have done."""

    def __init__(self, random, numbers):
        self.random = random
        self.numbers = numbers
        # The names of what a COMMIT would make permanent.
        self.expected = set()
        self.committed = False
        self.calls = []

    def name(self):
        return f"{next(self.numbers)}"

    async def run(self):
        fails = self.random.random() < 0.2
        async with transaction.aatomic():
            transaction.on_commit(self.callback)
            transaction.on_commit(lambda: self.calls.append("function"))
            self.expected |= await self.steps(depth=2)
            if fails:
                raise Rollback

    async def callback(self):
        self.committed = True
        await asyncio.sleep(0)
        self.calls.append("coroutine function")

    async def steps(self, depth):
        """Return the names that they have written."""
        steps = [self.step(depth) for _ in range(self.random.randint(1, 4))]
        if self.random.random() < 0.5:
            return set().union(*await asyncio.gather(*steps))
        written = set()
        try:
            while steps:
                written |= await steps.pop(0)
        finally:
            for step in steps:
                step.close()
        return written

    async def step(self, depth):
        kinds = [
            self.acreate,
            self.create,
            self.to_thread,
            self.insensitive,
            self.async_to_sync,
            self.wait,
            self.fail_in_thread,
        ]
        if depth:
            kinds += [self.nested] * 4
        kind = self.random.choice(kinds)
        if kind == self.nested:
            return await kind(depth - 1)
        return await kind() or set()

    async def nested(self, depth):
        fails = self.random.random() < 0.3
        try:
            async with transaction.aatomic():
                written = await self.steps(depth)
                await asyncio.sleep(0)
                if fails:
                    raise Rollback
        except Rollback:
            return set()
        return written

    async def acreate(self):
        name = self.name()
        await Entry.objects.acreate(name=name)
        return {name}

    async def create(self):
        name = self.name()
        await sync_to_async(create)(name)
        return {name}

    async def to_thread(self):
        name = self.name()
        await asyncio.to_thread(create_in_block, name)
        return {name}

    async def insensitive(self):
        name = self.name()
        await sync_to_async(create_in_block, thread_sensitive=False)(name)
        return {name}

    async def async_to_sync(self):
        return await sync_to_async(async_to_sync(self.acreate))()

    async def wait(self):
        await asyncio.sleep(self.random.random() / 500)

    async def fail_in_thread(self):
        try:
            await asyncio.to_thread(create_in_block, self.name(), fail=True)
        except Rollback:
            pass


class StressTests(AsyncTransactionTestCase):
    async def work(self, job, semaphore):
        interruption = Interruption()
        if job.random.random() < 0.4:
            interruption = Interruption(
                job.random.randrange(20),
                job.random.randrange(40),
                late=job.random.random() < 0.5,
            )
        async with semaphore:
            task = asyncio.create_task(interruption.run(job.run()))
            await asyncio.wait([task])
        if task.cancelled():
            self.assertIs(interruption.happened, True)
            return
        exception = task.exception()
        if exception is None:
            self.assertIs(job.committed, True)
        else:
            self.assertIsInstance(exception, Rollback)
            self.assertIs(job.committed, False)

    async def stress(self, seed, numbers):
        # Threads that wait for a nested block must not be all there are: the
        # block may need another one.
        executor = ThreadPoolExecutor(100)
        asyncio.get_running_loop().set_default_executor(executor)
        self.addCleanup(executor.shutdown)
        jobs = [Job(random.Random(f"{seed} {n}"), numbers) for n in range(TASKS)]
        # On SQLite, the others wait for one.
        semaphore = asyncio.Semaphore(6 if connection.vendor != "sqlite" else 2)
        async with asyncio.timeout(60):
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(self.work(job, semaphore))
        expected = set()
        for job in jobs:
            if job.committed:
                expected |= job.expected
                # Also if the task was cancelled in the first one.
                self.assertIn("function", job.calls)
            else:
                self.assertEqual(job.calls, [])
        await self.assertAsyncNames(*expected)
        # Not all of them were cancelled or failed, or none.
        self.assertIn(sum(job.committed for job in jobs), range(1, TASKS))

    def test_random_jobs(self):
        # Whoever inserts a unique value that was deleted before can be the
        # victim of a deadlock on InnoDB.
        numbers = itertools.count()
        for seed in range(SEEDS):
            with self.subTest(seed=seed):
                async_to_sync(self.stress)(seed, numbers)
                Entry.objects.all().delete()
