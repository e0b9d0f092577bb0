"""
Tasks that views start, and that go on after the end of the request.
"""

import asyncio
import logging

from rounds.project import usage
from rounds.project.models import Job

from django.db import new_connection, transaction

logger = logging.getLogger(__name__)

tasks = set()


def start(job, name):
    """Start a task that does something when the request has ended."""
    task = asyncio.create_task(run(job, name, usage.current.get().ended))
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def run(job, name, ended):
    # It's not the request's any more.
    usage.current.set(None)
    await ended.wait()
    try:
        await job(name)
    except Exception:
        logger.exception("The job %r of %s failed.", job.__name__, name)


async def plain(name):
    await Job.objects.acreate(name=name, kind="plain")


async def on_own_connection(name):
    async with new_connection("other"):
        await Job.objects.acreate(name=name, kind="connection")


async def in_own_block(name):
    async with transaction.aatomic("other"):
        await Job.objects.acreate(name=name, kind="block")


async def refused(name):
    """It was started inside of a block, which has ended."""
    try:
        await Job.objects.acreate(name=name, kind="outlived")
    except transaction.TransactionManagementError:
        async with new_connection("other"):
            await Job.objects.acreate(name=name, kind="refused")
