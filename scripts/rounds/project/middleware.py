"""
Middleware of both colours. All of it uses the database on both ways.
"""

from rounds.project.models import Audit, Product, Visit

from django.db import transaction
from django.utils.decorators import async_only_middleware, sync_only_middleware


@async_only_middleware
def note_visits(get_response):
    async def middleware(request):
        name = request.headers.get("X-Name")
        if name is None:
            return await get_response(request)
        visit = await Visit.objects.acreate(name=name)
        response = await get_response(request)
        async with transaction.aatomic():
            visit.status = response.status_code
            await visit.asave()
        return response

    return middleware


@sync_only_middleware
def look_around(get_response):
    def middleware(request):
        Product.objects.count()
        Audit.objects.count()
        response = get_response(request)
        with transaction.atomic():
            Product.objects.count()
        return response

    return middleware
