"""
Promise 15: ATOMIC_REQUESTS does for asynchronous views what it does for
synchronous ones.

Each scenario is a pair of views, one of either colour. Both are requested with
both clients, and the four outcomes are compared with what's expected.
"""

from asgiref.sync import async_to_sync, sync_to_async

from django.db import IntegrityError, connections, transaction
from django.db.transaction import aatomic, atomic, non_atomic_requests
from django.http import HttpResponse, StreamingHttpResponse
from django.template.response import SimpleTemplateResponse
from django.test import override_settings
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View

from .base import AsyncTransactionTestCase, Rollback
from .models import Entry

OTHER = Entry.objects.using("other")


def in_blocks():
    return [connections[alias].in_atomic_block for alias in ("default", "other")]


def create_both():
    Entry.objects.create(name="view")
    OTHER.create(name="view")


async def acreate_both():
    await Entry.objects.acreate(name="view")
    await OTHER.acreate(name="view")


# ##### Pairs of views #####


def succeeds(request):
    create_both()
    return HttpResponse(f"{in_blocks()}")


async def asucceeds(request):
    await acreate_both()
    return HttpResponse(f"{in_blocks()}")


def fails(request):
    create_both()
    raise Rollback


async def afails(request):
    await acreate_both()
    raise Rollback


def responds_with_error(request):
    create_both()
    return HttpResponse(status=503)


async def aresponds_with_error(request):
    await acreate_both()
    return HttpResponse(status=503)


def sets_rollback(request):
    create_both()
    transaction.set_rollback(True)
    return HttpResponse()


async def asets_rollback(request):
    await acreate_both()
    await transaction.aset_rollback(True)
    return HttpResponse()


def breaks_transaction(request):
    create_both()
    try:
        Entry.objects.create(name="view")
    except IntegrityError:
        return HttpResponse("caught")


async def abreaks_transaction(request):
    await acreate_both()
    try:
        await Entry.objects.acreate(name="view")
    except IntegrityError:
        return HttpResponse("caught")


def catches_in_savepoint(request):
    create_both()
    try:
        with atomic():
            Entry.objects.create(name="view")
    except IntegrityError:
        return HttpResponse("caught")


async def acatches_in_savepoint(request):
    await acreate_both()
    try:
        async with aatomic():
            await Entry.objects.acreate(name="view")
    except IntegrityError:
        return HttpResponse("caught")


def is_durable(request):
    create_both()
    with atomic(durable=True):
        pass


async def ais_durable(request):
    await acreate_both()
    async with aatomic(durable=True):
        pass


def fails_while_committing(request):
    create_both()

    def fail():
        raise Rollback

    transaction.on_commit(fail)
    return HttpResponse()


async def afails_while_committing(request):
    await acreate_both()

    async def fail():
        raise Rollback

    transaction.on_commit(fail)
    return HttpResponse()


def calls_hook(request):
    create_both()
    response = HttpResponse()
    transaction.on_commit(lambda: response.write(f"{in_blocks()}"))
    return response


async def acalls_hook(request):
    await acreate_both()
    response = HttpResponse()

    async def hook():
        response.write(f"{in_blocks()}")

    transaction.on_commit(hook)
    return response


class Renders(SimpleTemplateResponse):
    @property
    def rendered_content(self):
        content = f"{in_blocks()}"
        Entry.objects.create(name="rendered")
        return content


def renders(request):
    create_both()
    return Renders("")


async def arenders(request):
    await acreate_both()
    return Renders("")


class FailsToRender(SimpleTemplateResponse):
    @property
    def rendered_content(self):
        raise Rollback


def fails_to_render(request):
    create_both()
    return FailsToRender("")


async def afails_to_render(request):
    await acreate_both()
    return FailsToRender("")


@non_atomic_requests
def not_atomic(request):
    create_both()
    raise Rollback


@non_atomic_requests
async def anot_atomic(request):
    await acreate_both()
    raise Rollback


@non_atomic_requests(using="other")
def not_atomic_on_other(request):
    create_both()
    raise Rollback


@non_atomic_requests(using="other")
async def anot_atomic_on_other(request):
    await acreate_both()
    raise Rollback


@non_atomic_requests(using="other")
@non_atomic_requests
def not_atomic_at_all(request):
    create_both()
    raise Rollback


@non_atomic_requests(using="other")
@non_atomic_requests
async def anot_atomic_at_all(request):
    await acreate_both()
    raise Rollback


class Fails(View):
    def get(self, request):
        return fails(request)


class AsyncFails(View):
    async def get(self, request):
        return await afails(request)


@method_decorator(non_atomic_requests, name="dispatch")
class NotAtomic(Fails):
    pass


@method_decorator(non_atomic_requests, name="dispatch")
class AsyncNotAtomic(AsyncFails):
    pass


def streams(request):
    def content():
        yield f"{in_blocks()}"
        Entry.objects.create(name="content")
        raise Rollback

    create_both()
    return StreamingHttpResponse(content())


async def astreams(request):
    async def content():
        yield f"{in_blocks()}"
        await Entry.objects.acreate(name="content")
        raise Rollback

    await acreate_both()
    return StreamingHttpResponse(content())


PAIRS = [
    (succeeds, asucceeds),
    (fails, afails),
    (responds_with_error, aresponds_with_error),
    (sets_rollback, asets_rollback),
    (breaks_transaction, abreaks_transaction),
    (catches_in_savepoint, acatches_in_savepoint),
    (is_durable, ais_durable),
    (fails_while_committing, afails_while_committing),
    (calls_hook, acalls_hook),
    (renders, arenders),
    (fails_to_render, afails_to_render),
    (not_atomic, anot_atomic),
    (not_atomic_on_other, anot_atomic_on_other),
    (not_atomic_at_all, anot_atomic_at_all),
    (streams, astreams),
]

urlpatterns = [
    path(f"{colour}/{pair[0].__name__}/", view)
    for pair in PAIRS
    for colour, view in zip(("sync", "async"), pair)
]
urlpatterns += [
    path("sync/class_fails/", Fails.as_view()),
    path("async/class_fails/", AsyncFails.as_view()),
    path("sync/class_not_atomic/", NotAtomic.as_view()),
    path("async/class_not_atomic/", AsyncNotAtomic.as_view()),
]


# ##### Middleware #####


class Middleware:
    """Turn an exception into a response. Query on both ways."""

    sync_capable = True
    async_capable = False

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        Entry.objects.create(name="before")
        response = self.get_response(request)
        Entry.objects.create(name="after")
        return response

    def process_view(self, request, view, args, kwargs):
        Entry.objects.create(name="process_view")

    def process_exception(self, request, exception):
        Entry.objects.create(name="process_exception")
        return HttpResponse(f"{type(exception).__name__} {in_blocks()}")


def async_middleware(get_response):
    async def middleware(request):
        await Entry.objects.acreate(name="before")
        response = await get_response(request)
        await Entry.objects.acreate(name="after")
        return response

    async def process_view(request, view, args, kwargs):
        await Entry.objects.acreate(name="process_view")

    async def process_exception(request, exception):
        await Entry.objects.acreate(name="process_exception")
        return HttpResponse(f"{type(exception).__name__} {in_blocks()}")

    middleware.process_view = process_view
    middleware.process_exception = process_exception
    return middleware


async_middleware.sync_capable = False
async_middleware.async_capable = True


@override_settings(ROOT_URLCONF=__name__)
class AtomicRequestsParityTests(AsyncTransactionTestCase):
    databases = {"default", "other"}
    both = ["view"], ["view"]
    neither = [], []

    def setUp(self):
        super().setUp()
        for alias in ("default", "other"):
            settings = connections[alias].settings_dict
            self.addCleanup(settings.__setitem__, "ATOMIC_REQUESTS", False)
            settings["ATOMIC_REQUESTS"] = True

    def requests(self, name):
        """Give what each of the four ways to request the view leads to."""
        for colour in "sync", "async":
            for get in self.client.get, async_to_sync(self.async_client.get):
                Entry.objects.all().delete()
                OTHER.all().delete()
                with self.subTest(view=f"{colour}/{name}", client=get):
                    yield lambda: get(f"/{colour}/{name}/")

    def stored(self):
        return tuple(
            sorted(Entry.objects.using(alias).values_list("name", flat=True))
            for alias in ("default", "other")
        )

    def check(self, name, content, stored, status=200):
        for request in self.requests(name):
            response = request()
            self.assertEqual(response.status_code, status)
            self.assertEqual(response.content.decode(), content)
            self.assertEqual(self.stored(), stored)

    def check_raises(self, name, exception, stored):
        for request in self.requests(name):
            with self.assertRaises(exception):
                request()
            self.assertEqual(self.stored(), stored)

    def test_commit(self):
        self.check("succeeds", "[True, True]", self.both)

    def test_error_response(self):
        self.check("responds_with_error", "", self.both, status=503)

    def test_exception(self):
        self.check_raises("fails", Rollback, self.neither)
        self.check_raises("class_fails", Rollback, self.neither)

    def test_set_rollback(self):
        self.check("sets_rollback", "", ([], ["view"]))

    def test_broken_transaction(self):
        """As in every block whose body swallows a database error."""
        self.check("breaks_transaction", "caught", ([], ["view"]))

    def test_savepoint(self):
        self.check("catches_in_savepoint", "caught", self.both)

    def test_durable(self):
        self.check_raises("is_durable", RuntimeError, self.neither)

    def test_exception_in_on_commit(self):
        """The transaction of the other alias is around that of the default."""
        self.check_raises("fails_while_committing", Rollback, (["view"], []))

    def test_on_commit(self):
        """While that of the other alias is still open."""
        self.check("calls_hook", "[False, True]", self.both)

    def test_rendering(self):
        """A template response is rendered after the transaction."""
        stored = ["rendered", "view"], ["view"]
        self.check("renders", "[False, False]", stored)
        self.check_raises("fails_to_render", Rollback, self.both)

    def test_non_atomic_requests(self):
        self.check_raises("not_atomic", Rollback, (["view"], []))
        self.check_raises("class_not_atomic", Rollback, (["view"], []))
        self.check_raises("not_atomic_on_other", Rollback, ([], ["view"]))
        self.check_raises("not_atomic_at_all", Rollback, self.both)

    def test_streaming(self):
        """The content is produced after the transaction."""
        response = self.client.get("/sync/streams/")
        self.check_streaming(iter(response).__next__)
        Entry.objects.all().delete()
        OTHER.all().delete()

        async def stream():
            response = await self.async_client.get("/async/streams/")
            content = aiter(response)
            await sync_to_async(self.check_streaming)(async_to_sync(content.__anext__))

        async_to_sync(stream)()

    def check_streaming(self, next_part):
        self.assertEqual(next_part(), b"[False, False]")
        self.assertEqual(self.stored(), self.both)
        with self.assertRaises(Rollback):
            next_part()
        self.assertEqual(self.stored(), (["content", "view"], ["view"]))

    def check_middleware(self):
        """It's outside of the transaction: what it writes stays."""
        own = ["after", "before", "process_exception", "process_view"]
        self.check("fails", "Rollback [False, False]", (own, []))
        self.check("class_fails", "Rollback [False, False]", (own, []))
        self.check("not_atomic", "Rollback [False, False]", ([*own, "view"], []))
        own.remove("process_exception")
        self.check("succeeds", "[True, True]", ([*own, "view"], ["view"]))

    @override_settings(MIDDLEWARE=[f"{__name__}.Middleware"])
    def test_sync_middleware(self):
        self.check_middleware()

    @override_settings(MIDDLEWARE=[f"{__name__}.async_middleware"])
    def test_async_middleware(self):
        self.check_middleware()
