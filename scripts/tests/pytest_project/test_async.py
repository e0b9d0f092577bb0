"""
The fixture `db` covers asynchronous tests.

On stock Django, these tests fail: what they do in a thread uses a connection
of that thread, outside of the fixture's transaction.
"""

import asyncio

import pytest
from asgiref.sync import sync_to_async
from entries.models import Entry

from django.db import connection

# Each test is there twice: the second one fails if something is left of the
# first.
pytestmark = pytest.mark.parametrize("run", [1, 2])


async def names():
    return [entry.name async for entry in Entry.objects.order_by("name")]


def create(name):
    return Entry.objects.create(name=name)


async def test_writes(db, run):
    assert await names() == []
    await Entry.objects.acreate(name="a")
    await sync_to_async(create)("b")
    assert await names() == ["a", "b"]


async def test_writes_in_other_threads(db, run):
    await asyncio.to_thread(create, "a")
    await sync_to_async(create, thread_sensitive=False)("b")
    assert await names() == ["a", "b"]


async def test_writes_in_tasks(db, run):
    async with asyncio.TaskGroup() as group:
        for name in "abc":
            group.create_task(Entry.objects.acreate(name=name))
    assert await names() == ["a", "b", "c"]


async def test_sync_fixture(entry, run):
    assert await Entry.objects.aget() == entry
    await Entry.objects.acreate(name="a")
    assert await names() == ["a", "fixture"]


@pytest.fixture
async def async_entry(db):
    entry = await Entry.objects.acreate(name="async fixture")
    yield entry
    assert await Entry.objects.aget(name="async fixture") == entry


async def test_async_fixture(async_entry, entry, run):
    await Entry.objects.acreate(name="a")
    assert await names() == ["a", "async fixture", "fixture"]


def test_async_fixture_in_a_sync_test(async_entry, run):
    assert Entry.objects.get() == async_entry


@pytest.mark.asyncio(loop_scope="module")
async def test_loop_of_other_tests(db, run):
    assert await names() == []
    await Entry.objects.acreate(name="a")


async def test_async_client(async_client, db, entry, run):
    await async_client.get("/add/a/")
    assert await names() == ["a", "fixture"]


async def test_num_queries(db, django_assert_num_queries, run):
    with django_assert_num_queries(2):
        await Entry.objects.acreate(name="a")
        await Entry.objects.acount()


async def test_connection(db, run):
    assert connection.in_atomic_block
