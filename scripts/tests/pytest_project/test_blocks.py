"""
Transactions in asynchronous tests.
"""

import asyncio
from urllib.request import urlopen

import pytest
from entries.models import Entry

from django.db import connection, transaction
from django.test import TestCase

pytestmark = pytest.mark.parametrize("run", [1, 2])


class Rollback(Exception):
    pass


async def names():
    return [entry.name async for entry in Entry.objects.order_by("name")]


async def use_blocks():
    assert await names() == []
    async with transaction.aatomic(durable=True):
        await Entry.objects.acreate(name="a")
    with pytest.raises(Rollback):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="b")
            raise Rollback
    assert await names() == ["a"]


async def test_db(db, run):
    await use_blocks()


async def test_transactional_db(async_transactional_db, run):
    await use_blocks()


@pytest.fixture
async def block(db):
    async with transaction.aatomic():
        await Entry.objects.acreate(name="fixture")
        yield


async def test_block_around_a_test(block, run):
    """It's entered and left in tasks that aren't the test's."""
    assert await names() == ["fixture"]
    async with transaction.aatomic():
        await Entry.objects.acreate(name="a")
    assert await names() == ["a", "fixture"]


async def test_async_client(async_client, db, run):
    await async_client.get("/add-in-a-block/a/")
    assert await names() == ["a"]


async def test_live_server(live_server, async_transactional_db, run):
    def get():
        urlopen(f"{live_server.url}/add-in-a-block/a/", timeout=10).close()

    await asyncio.to_thread(get)
    assert await names() == ["a"]


async def test_num_queries(async_transactional_db, django_assert_num_queries, run):
    with django_assert_num_queries(4):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="a")
        await Entry.objects.acount()


async def test_on_commit(db, django_capture_on_commit_callbacks, run):
    called = []
    with django_capture_on_commit_callbacks(execute=True) as callbacks:
        async with transaction.aatomic():
            transaction.on_commit(lambda: called.append("called"))
    assert len(callbacks) == 1
    assert called == ["called"]


async def test_on_commit_with_coroutine_function(db, run):
    async def add():
        await Entry.objects.acreate(name="callback")

    async with TestCase.acaptureOnCommitCallbacks(execute=True):
        async with transaction.aatomic():
            transaction.on_commit(add)
    assert await names() == ["callback"]


async def test_on_commit_of_a_transaction(async_transactional_db, run):
    async def add():
        assert not connection.in_atomic_block
        await Entry.objects.acreate(name="callback")

    async with transaction.aatomic():
        transaction.on_commit(add)
    assert await names() == ["callback"]
