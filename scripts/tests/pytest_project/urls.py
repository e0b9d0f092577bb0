from entries.models import Entry

from django.db import transaction
from django.http import HttpResponse
from django.urls import path


async def add(request, name):
    await Entry.objects.acreate(name=name)
    return HttpResponse()


async def add_in_a_block(request, name):
    async with transaction.aatomic():
        await Entry.objects.acreate(name=name)
    return HttpResponse()


urlpatterns = [
    path("add/<name>/", add),
    path("add-in-a-block/<name>/", add_in_a_block),
]
