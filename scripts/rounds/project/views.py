"""
The views of the shop, of both colours.

The name of what a request creates is in its header X-Name.
"""

import asyncio
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from asgiref.sync import async_to_sync, sync_to_async
from rounds.project import jobs, usage
from rounds.project.models import (
    Audit,
    Gift,
    Item,
    Line,
    Order,
    Product,
)

from django.conf import settings
from django.contrib.auth import (
    aauthenticate,
    alogin,
    alogout,
    authenticate,
    get_user,
    login,
)
from django.core.paginator import AsyncPaginator
from django.db import connection, run_sync, transaction
from django.db.models import Sum, Value
from django.db.models.functions import Coalesce
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.views.decorators.csrf import csrf_exempt

# A statement that takes a while.
SLEEP = {
    "postgresql": "SELECT pg_sleep(%s)",
    "mysql": "SELECT SLEEP(%s)",
}


class SoldOut(usage.Failure):
    pass


class Withdrawn(Exception):
    pass


def name_of(request):
    return request.headers["X-Name"]


def token_of(user):
    """Return what only this user's session may have."""
    return f"token of {user.username}"


def is_atomic(alias):
    return settings.DATABASES[alias]["ATOMIC_REQUESTS"]


# ##### Sessions and users #####


@csrf_exempt
def sign_in(request):
    name = request.POST["user"]
    user = authenticate(request, username=name, password=name)
    login(request, user)
    request.session["token"] = token_of(user)
    return HttpResponse()


@csrf_exempt
async def sign_in_async(request):
    name = request.POST["user"]
    user = await aauthenticate(request, username=name, password=name)
    await alogin(request, user)
    await request.session.aset("token", token_of(user))
    return HttpResponse()


@csrf_exempt
async def sign_out(request):
    await alogout(request)
    return HttpResponse()


def whoami(request):
    request.session["visits"] = request.session.get("visits", 0) + 1
    return JsonResponse(
        {
            "user": get_user(request).username,
            "token": request.session.get("token", ""),
            "visits": request.session["visits"],
        }
    )


async def whoami_async(request):
    visits = await request.session.aget("visits", 0) + 1
    await request.session.aset("visits", visits)
    user = await request.auser()
    return JsonResponse(
        {
            "user": user.username,
            "token": await request.session.aget("token", ""),
            "visits": visits,
        }
    )


# ##### Orders #####


def audit(name):
    Audit.objects.create(name=name)


async def aaudit(name):
    await Audit.objects.acreate(name=name)


def place(name, user, wanted):
    """Place an order: an id and a quantity for each product."""
    with transaction.atomic():
        products = Product.objects.select_for_update().order_by("pk")
        products = list(products.filter(pk__in=wanted))
        order = Order.objects.create(name=name, user=user)
        for product in products:
            if product.stock < wanted[product.pk]:
                raise SoldOut
            # Not an F() expression: only the lock makes it right.
            product.stock -= wanted[product.pk]
            product.save(update_fields=["stock"])
            order.line_set.create(product=product, quantity=wanted[product.pk])
        try:
            with transaction.atomic():
                Gift.objects.create(order=order)
                raise Withdrawn
        except Withdrawn:
            pass
        transaction.on_commit(partial(audit, name))
        order.is_complete = True
        order.save()


async def aplace(name, user, wanted):
    async with transaction.aatomic():
        products = Product.objects.select_for_update().order_by("pk")
        products = [product async for product in products.filter(pk__in=wanted)]
        order = await Order.objects.acreate(name=name, user=user)
        for product in products:
            if product.stock < wanted[product.pk]:
                raise SoldOut
            product.stock -= wanted[product.pk]
        await asyncio.gather(*[aplace_line(order, each, wanted) for each in products])
        try:
            async with transaction.aatomic():
                await Gift.objects.acreate(order=order)
                raise Withdrawn
        except Withdrawn:
            pass
        transaction.on_commit(partial(aaudit, name))
        order.is_complete = True
        await order.asave()


async def aplace_line(order, product, wanted):
    await product.asave(update_fields=["stock"])
    await order.line_set.acreate(product=product, quantity=wanted[product.pk])


def wanted_by(request):
    """Return a quantity for each of some products, by their ids."""
    return {
        int(number): int(quantity)
        for number, quantity in (
            pair.split(":") for pair in request.GET["wanted"].split(",")
        )
    }


def respond_to_buyer(func):
    """Let a view of either colour tell that something is sold out."""
    if asyncio.iscoroutinefunction(func):

        async def view(request):
            try:
                user = await request.auser()
                # All that's evaluated is the user, which is there.
                await func(name_of(request), user if user.pk else None, request)
            except SoldOut:
                return HttpResponse(status=409)
            return HttpResponse()

    else:

        def view(request):
            try:
                user = get_user(request)
                func(name_of(request), user if user.pk else None, request)
            except SoldOut:
                return HttpResponse(status=409)
            return HttpResponse()

    view.__name__ = func.__name__
    # A transaction around the other database's part would roll back what
    # on_commit() does there, if the view is interrupted after the commit.
    return csrf_exempt(transaction.non_atomic_requests(using="other")(view))


@respond_to_buyer
def buy(name, user, request):
    place(name, user, wanted_by(request))


@respond_to_buyer
async def buy_async(name, user, request):
    await aplace(name, user, wanted_by(request))


@respond_to_buyer
async def buy_crossing(name, user, request):
    """A block, a thread, and a coroutine which that calls."""
    async with transaction.aatomic():
        await sync_to_async(async_to_sync(aplace))(name, user, wanted_by(request))


@respond_to_buyer
async def buy_run_sync(name, user, request):
    await run_sync(place, name, user, wanted_by(request))


@respond_to_buyer
async def slow(name, user, request):
    """Take as long as the request says, in a transaction."""
    seconds = float(request.GET["seconds"])
    async with transaction.aatomic():
        order = await Order.objects.acreate(name=name, user=user)
        transaction.on_commit(partial(audit, name))
        if "statement" in request.GET and connection.vendor in SLEEP:
            async with connection.acursor() as cursor:
                await cursor.execute(SLEEP[connection.vendor], [seconds])
        else:
            await asyncio.sleep(seconds)
        order.is_complete = True
        await order.asave()


# ##### Failures #####


@contextmanager
def in_block(alias):
    if is_atomic(alias):
        yield
    else:
        with transaction.atomic(using=alias):
            yield


@asynccontextmanager
async def ain_block(alias):
    if is_atomic(alias):
        yield
    else:
        async with transaction.aatomic(alias):
            yield


@csrf_exempt
def fail(request):
    with in_block("default"), in_block("other"):
        place(name_of(request), None, wanted_by(request))
        audit(name_of(request))
        raise usage.Failure


@csrf_exempt
async def fail_async(request):
    async with ain_block("default"), ain_block("other"):
        await aplace(name_of(request), None, wanted_by(request))
        await aaudit(name_of(request))
        raise usage.Failure


# ##### Reading #####


async def browse(request):
    """Return a page, and how much there is, in stock and ordered."""
    paginator = AsyncPaginator(Item.objects.order_by("pk"), 20)
    page = await paginator.aget_page(request.GET["page"])
    ordered = Line.objects.order_by().values(one=Value(1)).annotate(n=Sum("quantity"))
    # One statement, so that it's what was committed at one moment.
    total = await Product.objects.aaggregate(
        total=Sum("stock") + Coalesce(ordered.values("n")[:1], 0)
    )
    items = [item.pk async for item in page.object_list]
    return JsonResponse({"items": items, **total})


async def export(request):
    async def content():
        async for item in Item.objects.order_by("pk").aiterator(chunk_size=50):
            yield f"{item.text}\n"

    return StreamingHttpResponse(content(), content_type="text/plain")


async def gather(request):
    """Query and write at the same time, with more than one block."""
    usage.current.get().is_limited = False

    async def write(number):
        async with transaction.aatomic("other"):
            await Audit.objects.acreate(name=f"{name_of(request)} {number}")
            if number == 1:
                raise usage.Failure

    results = await asyncio.gather(
        *[Item.objects.acount() for _ in range(5)],
        *[write(number) for number in range(3)],
        return_exceptions=True,
    )
    return JsonResponse(
        {"counts": [result for result in results if isinstance(result, int)]}
    )


# ##### Tasks that outlive the request #####


@csrf_exempt
@transaction.non_atomic_requests(using="other")
async def job(request):
    start = {
        "plain": start_plain,
        "connection": start_in_block,
        "block": start_in_block,
        "refused": start_in_block,
        "on_commit": start_on_commit,
    }
    kind, fails = request.GET["kind"], "fails" in request.GET
    async with ain_block("default"):
        await start[kind](kind, name_of(request), fails)
    return HttpResponse()


async def start_plain(kind, name, fails):
    jobs.start(jobs.plain, name)


async def start_in_block(kind, name, fails):
    started = {
        "connection": jobs.on_own_connection,
        "block": jobs.in_own_block,
        "refused": jobs.refused,
    }
    async with transaction.aatomic("other"):
        await Audit.objects.acount()
        jobs.start(started[kind], name)


async def start_on_commit(kind, name, fails):
    async def start():
        jobs.start(jobs.plain, name)

    async with transaction.aatomic("other"):
        await Audit.objects.acreate(name=f"{name} job")
        transaction.on_commit(start, using="other")
        if fails:
            raise usage.Failure
