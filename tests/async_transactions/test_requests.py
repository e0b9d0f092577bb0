"""
Promise 15: ATOMIC_REQUESTS with asynchronous views.
"""

from asgiref.sync import sync_to_async

from django.db import connection, transaction
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path

from .base import AsyncTransactionTestCase, Rollback
from .models import Entry


async def succeeds(request):
    await Entry.objects.acreate(name="succeeds")
    return HttpResponse(f"{transaction.get_connection().in_atomic_block}")


async def fails(request):
    await Entry.objects.acreate(name="fails")
    raise Rollback


@transaction.non_atomic_requests
async def non_atomic(request):
    await Entry.objects.acreate(name="non-atomic")
    raise Rollback


class RespondsToExceptions:
    """Turn an exception into a response, outside of the transaction."""

    async_capable = True
    sync_capable = True

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        return self.get_response(request)

    def process_exception(self, request, exception):
        return HttpResponse("handled", status=500)


urlpatterns = [
    path("succeeds/", succeeds),
    path("fails/", fails),
    path("non-atomic/", non_atomic),
]


@override_settings(ROOT_URLCONF=__name__)
class AtomicRequestsTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        settings = connection.settings_dict
        self.addCleanup(settings.__setitem__, "ATOMIC_REQUESTS", False)
        settings["ATOMIC_REQUESTS"] = True

    async def test_commit(self):
        response = await self.async_client.get("/succeeds/")
        self.assertEqual(response.content, b"True")
        await self.assertAsyncNames("succeeds")

    async def test_rollback(self):
        with self.assertRaises(Rollback):
            await self.async_client.get("/fails/")
        await self.assertAsyncNames()

    async def test_non_atomic_requests(self):
        with self.assertRaises(Rollback):
            await self.async_client.get("/non-atomic/")
        await self.assertAsyncNames("non-atomic")

    @override_settings(MIDDLEWARE=[f"{__name__}.RespondsToExceptions"])
    async def test_exception_turned_into_a_response(self):
        response = await self.async_client.get("/fails/")
        self.assertEqual(response.content, b"handled")
        await self.assertAsyncNames()

    def test_sync_handler(self):
        """An asynchronous view under WSGI."""
        self.assertEqual(self.client.get("/succeeds/").content, b"True")
        with self.assertRaises(Rollback):
            self.client.get("/fails/")
        self.assertNames("succeeds")

    async def test_inside_a_block(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await self.async_client.get("/succeeds/")
                await sync_to_async(self.client.get)("/non-atomic/")
        await self.assertAsyncNames()
