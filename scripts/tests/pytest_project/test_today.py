"""
What pytest-django and pytest-asyncio do with stock Django.

Each test that writes is there twice: the second one fails if something is left
of the first.
"""

import asyncio
from urllib.request import urlopen

import pytest
from asgiref.sync import sync_to_async
from entries.models import Entry

from django.db import connection, transaction
from django.test import TestCase


def check_empty_and_create():
    assert not Entry.objects.exists()
    Entry.objects.create(name="a")
    assert Entry.objects.get().name == "a"


@pytest.mark.parametrize("run", [1, 2])
def test_db(db, run):
    assert connection.in_atomic_block
    check_empty_and_create()


@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.django_db
def test_mark(run):
    check_empty_and_create()


@pytest.mark.parametrize("run", [1, 2])
def test_transactional_db(transactional_db, run):
    assert not connection.in_atomic_block
    check_empty_and_create()


def test_fixture(entry):
    assert Entry.objects.get() == entry


def test_no_database():
    with pytest.raises(RuntimeError, match="Database access not allowed"):
        Entry.objects.exists()


async def test_no_database_in_async_code():
    with pytest.raises(RuntimeError, match="Database access not allowed"):
        await Entry.objects.aexists()


@pytest.mark.parametrize("run", [1, 2])
async def test_async_db(db, run):
    """Synchronous code of one thread has worked, but for the rollback."""
    with pytest.raises(Entry.DoesNotExist):
        await Entry.objects.aget(name="missing")


@pytest.mark.parametrize("run", [1, 2])
async def test_async_transactional_db(async_transactional_db, run):
    await sync_to_async(check_empty_and_create)()
    assert await Entry.objects.acount() == 1


@pytest.mark.parametrize("run", [1, 2])
def test_client(client, db, run):
    client.get("/add/a/")
    assert Entry.objects.get().name == "a"


@pytest.mark.parametrize("run", [1, 2])
async def test_async_client(async_client, async_transactional_db, run):
    await async_client.get("/add/a/")
    assert (await Entry.objects.aget()).name == "a"


@pytest.mark.parametrize("run", [1, 2])
def test_live_server(live_server, run):
    urlopen(f"{live_server.url}/add/a/", timeout=10).close()
    assert Entry.objects.get().name == "a"


def test_num_queries(db, django_assert_num_queries):
    with django_assert_num_queries(3):
        check_empty_and_create()
    with pytest.raises(pytest.fail.Exception, match="Expected to perform 1 queries"):
        with django_assert_num_queries(1):
            pass


def test_on_commit(db, django_capture_on_commit_callbacks):
    called = []
    with django_capture_on_commit_callbacks(execute=True) as callbacks:
        transaction.on_commit(lambda: called.append("called"))
    assert len(callbacks) == 1
    assert called == ["called"]


class UnittestTests(TestCase):
    @classmethod
    def setUpTestData(cls):
        cls.entry = Entry.objects.create(name="class")

    def test_sync(self):
        self.assertEqual(Entry.objects.get(), self.entry)

    async def test_async(self):
        self.assertEqual(await Entry.objects.aget(), self.entry)


def test_loop(db):
    """A loop that the test starts itself."""
    asyncio.run(asyncio.sleep(0))
    check_empty_and_create()
