import pytest
from asgiref.sync import sync_to_async
from entries.models import Entry

from django.db import connections


@pytest.fixture
async def async_transactional_db(transactional_db):
    """
    transactional_db for asynchronous tests: without transactions, what they
    do in a thread uses a connection of that thread.
    """
    yield
    await sync_to_async(connections.close_all)()


@pytest.fixture
def entry(db):
    return Entry.objects.create(name="fixture")
