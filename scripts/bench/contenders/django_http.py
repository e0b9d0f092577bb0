"""
An application with one asynchronous view, in and outside of ATOMIC_REQUESTS.

It's its own ROOT_URLCONF.
"""

from django.core.asgi import get_asgi_application
from django.db import connections
from django.db.transaction import non_atomic_requests
from django.http import JsonResponse
from django.urls import path

urlpatterns = []


def application(item_model):
    """Return the application for a model."""
    connections.settings["default"]["ATOMIC_REQUESTS"] = True

    async def view(request, key):
        item = await item_model.objects.aget(pk=key)
        created = item.created.timestamp()
        data = [item.pk, item.name, item.price, created, item.note]
        return JsonResponse(data, safe=False)

    async def plain(request, key):
        return await view(request, key)

    urlpatterns[:] = [
        path("http/<int:key>", non_atomic_requests(plain)),
        path("http_atomic/<int:key>", view),
    ]
    return get_asgi_application()
