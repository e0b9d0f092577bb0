"""
Promises 11 and 12: every public asynchronous method that leads to the database
does so, and in native mode without a thread on the way.

The methods are found by introspection, so that a new one isn't forgotten.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from inspect import isasyncgenfunction, iscoroutinefunction, unwrap
from unittest import mock

from asgiref.sync import SyncToAsync

from django import shortcuts
from django.contrib import auth
from django.contrib.auth import backends
from django.contrib.auth.models import (
    AnonymousUser,
    Group,
    GroupManager,
    Permission,
    PermissionManager,
    User,
    UserManager,
)
from django.contrib.contenttypes.models import ContentType
from django.contrib.sessions.backends import db
from django.core.paginator import AsyncPage, AsyncPaginator
from django.db import connection, connections, run_sync, transaction
from django.db.backends.utils import CursorWrapper
from django.db.models import Count, Manager, Model, QuerySet, aprefetch_related_objects
from django.http import HttpRequest
from django.test import SimpleTestCase, TransactionTestCase, override_settings

from .models import Author, Book

is_native = "default" in connections.native_aliases

# Functions that have a thread on purpose: for computing, and for receivers
# that aren't written for event loops.
THREADED = {"set_password", "verify_password", "sync_send"}

_has_thread = ContextVar("has_thread", default=False)


@contextmanager
def no_threads():
    """Fail if a thread is used, or the event loop's own one is blocked."""
    found = []

    def watch(owner, name, is_wrong):
        original = getattr(owner, name)

        def inner(self, *args, **kwargs):
            if is_wrong(self) and not _has_thread.get():
                found.append(f"{owner.__name__}.{name}() of {self!r}")
            return original(self, *args, **kwargs)

        return mock.patch.object(owner, name, inner)

    call = SyncToAsync.__call__

    async def __call__(self, *args, **kwargs):
        if self.func.__name__ not in THREADED:
            found.append(f"sync_to_async({self.func.__name__})")
        token = _has_thread.set(True)
        try:
            return await call(self, *args, **kwargs)
        finally:
            _has_thread.reset(token)

    def on_loop(self):
        return asyncio._get_running_loop() is not None

    def starts_on_loop(thread):
        # That one looks after loops which are closed. No query needs it.
        return on_loop(thread) and thread.name != "loops with open blocks"

    patches = [
        mock.patch.object(SyncToAsync, "__call__", __call__),
        watch(ThreadPoolExecutor, "submit", on_loop),
        watch(threading.Thread, "start", starts_on_loop),
    ]
    if connection.vendor == "postgresql":
        patches.append(watch(connection.Database.Connection, "wait", on_loop))
    try:
        for patch in patches:
            patch.start()
        yield
    finally:
        for patch in patches:
            patch.stop()
    if found:
        raise AssertionError("Threads or blocking waits: " + ", ".join(found))


def asynchronous_names(owner):
    """Return the names of the public asynchronous functions of an object."""
    return {
        name
        for name in dir(owner)
        if not name.startswith("_")
        and callable(func := getattr(owner, name))
        and (iscoroutinefunction(unwrap(func)) or isasyncgenfunction(unwrap(func)))
    }


async def iterate(iterable):
    return [item async for item in iterable]


class GuardTests(SimpleTestCase):
    async def test_thread(self):
        with self.assertRaisesMessage(AssertionError, "sync_to_async(get_ident)"):
            with no_threads():
                await SyncToAsync(threading.get_ident)()

    async def test_executor(self):
        with self.assertRaisesMessage(AssertionError, "ThreadPoolExecutor.submit()"):
            with no_threads():
                await asyncio.to_thread(threading.get_ident)

    async def test_none(self):
        with no_threads():
            await asyncio.sleep(0)


class InventoryTestCase(TransactionTestCase):
    available_apps = [
        "async_bridge",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
    ]

    def setUp(self):
        self.author = Author.objects.create(name="author", created="2000-01-01")
        self.book = Book.objects.create(name="book", author=self.author)
        self.authors = Author.objects.order_by("name")
        # Asynchronous code can't look it up when it asks for a manager.
        ContentType.objects.get_for_model(Book)

    async def check(self, owner, calls, without_query=(), of=None):
        """
        Call each function in `calls`, which are to be all that `owner` has, in
        excess of `of`. Those not named in `without_query` execute one.
        """
        names = asynchronous_names(owner) - (asynchronous_names(of) if of else set())
        self.assertEqual(names, set(calls))
        for name, call in calls.items():
            with self.subTest(owner=owner, name=name):
                # A warm connection.
                await Author.objects.aexists()
                with self.noting_queries() as executed:
                    with no_threads() if is_native else nullcontext():
                        await call()
                if name not in without_query:
                    self.assertNotEqual(executed, [])

    @contextmanager
    def noting_queries(self):
        executed = []
        execute = CursorWrapper._execute

        def note(self, sql, *args):
            executed.append(sql)
            return execute(self, sql, *args)

        with mock.patch.object(CursorWrapper, "_execute", note):
            yield executed


class InventoryTests(InventoryTestCase):
    def query_set_calls(self, objects):
        new = Author(name="new")
        return {
            "aaggregate": lambda: objects.aaggregate(n=Count("*")),
            "abulk_create": lambda: objects.abulk_create([new]),
            "abulk_update": lambda: objects.abulk_update([self.author], ["name"]),
            "acontains": lambda: objects.acontains(self.author),
            "acount": objects.acount,
            "acreate": lambda: objects.acreate(name="created"),
            "aearliest": lambda: objects.aearliest("created"),
            "aexists": objects.aexists,
            "aexplain": objects.aexplain,
            "afirst": objects.afirst,
            "aget": lambda: objects.aget(name="author"),
            "aget_or_create": lambda: objects.aget_or_create(name="got"),
            "ain_bulk": lambda: objects.ain_bulk([self.author.pk]),
            "aiterator": lambda: iterate(objects.aiterator()),
            "alast": objects.alast,
            "alatest": lambda: objects.alatest("created"),
            "aupdate": lambda: objects.aupdate(name="author"),
            "aupdate_or_create": lambda: objects.aupdate_or_create(pk=self.author.pk),
        }

    async def test_query_set(self):
        calls = self.query_set_calls(self.authors)
        await self.check(QuerySet, {**calls, "adelete": self.authors.adelete})

    async def test_manager(self):
        await self.check(Manager, self.query_set_calls(Author.objects))

    async def test_model(self):
        await self.check(
            Model,
            {
                "arefresh_from_db": self.author.arefresh_from_db,
                "asave": self.author.asave,
                "adelete": self.author.adelete,
            },
        )

    async def test_related_managers(self):
        for manager, model in (
            (self.author.book_set, Book),
            (self.author.edited, Book),
            (self.book.editors, Author),
            (self.book.labels, self.book.labels.model),
        ):
            obj = await model.objects.acreate(name="related")
            calls = {
                "aadd": lambda: manager.aadd(obj),
                "aremove": lambda: manager.aremove(obj),
                "aset": lambda: manager.aset([obj]),
                "aclear": manager.aclear,
                "acreate": lambda: manager.acreate(name="created"),
                "aget_or_create": lambda: manager.aget_or_create(name="created"),
                "aupdate_or_create": lambda: manager.aupdate_or_create(name="new"),
            }
            # What they have from the class of their manager is tested above.
            inherited = dict.fromkeys(self.query_set_calls(manager), manager.acount)
            await self.check(type(manager), {**inherited, **calls})

    async def test_iteration(self):
        raw = Author.objects.raw(f"SELECT * FROM {Author._meta.db_table}")
        for iterable in (
            self.authors,
            self.authors.values(),
            self.authors.prefetch_related("book_set__editors"),
            self.authors.aiterator(),
            self.authors.prefetch_related("book_set").aiterator(),
            raw,
            raw.prefetch_related("book_set"),
            self.author.book_set.all(),
            self.book.labels.all(),
        ):
            with self.subTest(iterable=iterable):
                await Author.objects.aexists()
                with self.noting_queries() as executed:
                    with no_threads() if is_native else nullcontext():
                        await iterate(iterable)
                self.assertNotEqual(executed, [])

    async def test_prefetch(self):
        with no_threads() if is_native else nullcontext():
            await aprefetch_related_objects([self.author], "book_set__editors")
        self.assertEqual(list(self.author.book_set.all()), [self.book])

    async def test_paginator(self):
        calls = {
            name: lambda name=name: getattr(AsyncPaginator(self.authors, 1), name)()
            for name in ("acount", "anum_pages", "apage_range")
        }
        calls |= {
            name: lambda name=name: getattr(AsyncPaginator(self.authors, 1), name)(1)
            for name in ("apage", "aget_page", "avalidate_number")
        }
        calls["aget_elided_page_range"] = lambda: iterate(
            AsyncPaginator(self.authors, 1).aget_elided_page_range(1)
        )
        await self.check(AsyncPaginator, calls)

    async def test_page(self):
        def call(name):
            async def inner():
                await Author.objects.abulk_create([Author(name=f"{n}") for n in "abc"])
                page = await AsyncPaginator(self.authors, 1).apage(2)
                await getattr(page, name)()

            return inner

        await self.check(
            AsyncPage, {name: call(name) for name in asynchronous_names(AsyncPage)}
        )

    async def test_shortcuts(self):
        await self.check(
            shortcuts,
            {
                "aget_object_or_404": lambda: shortcuts.aget_object_or_404(Author),
                "aget_list_or_404": lambda: shortcuts.aget_list_or_404(Author),
            },
        )

    async def test_transaction(self):
        async def mark():
            async with transaction.amark_for_rollback_on_error():
                await Author.objects.aexists()

        async def manually():
            await transaction.aset_autocommit(False)
            await Author.objects.acreate(name="lost")
            await transaction.arollback()
            await Author.objects.acreate(name="kept")
            await transaction.acommit()
            await transaction.aset_autocommit(True)

        calls = dict.fromkeys(["acommit", "arollback", "aset_autocommit"], manually)
        # Without it, a new connection may have to be opened first.
        await manually()

        async def in_block():
            sid = await transaction.asavepoint_create()
            await transaction.asavepoint_rollback(sid)
            await transaction.asavepoint_commit(sid)
            await transaction.aclean_savepoints()
            await transaction.aset_rollback(await transaction.aget_rollback())
            await transaction.aget_autocommit()
            await transaction.aon_commit(Author.objects.count)

        async def block():
            async with transaction.aatomic():
                await in_block()

        await block()
        names = "asavepoint_create asavepoint_rollback asavepoint_commit on_commit"
        names += " aclean_savepoints aset_rollback aget_rollback aget_autocommit"
        calls |= dict.fromkeys(names.replace(" on", " aon").split(), block)
        calls["amark_for_rollback_on_error"] = mark
        await self.check(transaction, calls)

    async def test_run_sync(self):
        with no_threads() if is_native else nullcontext():
            self.assertEqual(await run_sync(Author.objects.count), 1)


class SyncBackend(backends.BaseBackend):
    def authenticate(self, request, **kwargs):
        return User.objects.get()

    def get_user(self, user_id):
        return User.objects.get(pk=user_id)

    def get_user_permissions(self, user_obj, obj=None):
        return set(user_obj.user_permissions.all())

    def get_group_permissions(self, user_obj, obj=None):
        return set(user_obj.groups.all())


class AuthInventoryTests(InventoryTestCase):
    def setUp(self):
        super().setUp()
        self.user = User.objects.create_user("user", password="password")
        self.permission = Permission.objects.get(
            codename="add_user", content_type__app_label="auth"
        )
        Group.objects.create(name="group")

    def fresh(self):
        """Return the user without what's cached on it."""
        return User(pk=self.user.pk, username="user", password=self.user.password)

    def request(self):
        request = HttpRequest()
        request.session = db.SessionStore()
        request.user = self.user

        async def auser():
            return self.user

        request.auser = auser
        return request

    async def test_auth(self):
        request = self.request()
        credentials = {"username": "user", "password": "password"}
        check = auth.acheck_password_with_timing_attack_mitigation
        await self.check(
            auth,
            {
                "aauthenticate": lambda: auth.aauthenticate(request, **credentials),
                "acheck_password_with_timing_attack_mitigation": lambda: check(
                    self.user, "password"
                ),
                "alogin": lambda: auth.alogin(request, self.user),
                "aget_user": lambda: auth.aget_user(request),
                "aupdate_session_auth_hash": lambda: auth.aupdate_session_auth_hash(
                    request, self.user
                ),
                "alogout": lambda: auth.alogout(request),
            },
            without_query={"acheck_password_with_timing_attack_mitigation"},
        )

    def permission_calls(self, backend=None, names=()):
        def call(name, *args):
            def inner():
                user = self.fresh()
                if backend is None:
                    return getattr(user, name)(*args)
                return getattr(backend, name)(user, *args)

            return inner

        return {
            "aget_user_permissions": call("aget_user_permissions"),
            "aget_group_permissions": call("aget_group_permissions"),
            "aget_all_permissions": call("aget_all_permissions"),
            "ahas_perm": call("ahas_perm", "auth.add_user"),
            **{name: call(name, arg) for name, arg in names},
        }

    async def test_user(self):
        calls = self.permission_calls(
            names=[("ahas_perms", ["auth.add_user"]), ("ahas_module_perms", "auth")]
        )
        calls["acheck_password"] = lambda: self.user.acheck_password("password")
        await self.check(User, calls, without_query={"acheck_password"}, of=Model)

    async def test_password_upgrade(self):
        hashers = [
            "django.contrib.auth.hashers.PBKDF2PasswordHasher",
            "django.contrib.auth.hashers.MD5PasswordHasher",
        ]
        with (
            override_settings(PASSWORD_HASHERS=hashers),
            no_threads() if is_native else nullcontext(),
        ):
            self.assertIs(await self.user.acheck_password("password"), True)
        await self.user.arefresh_from_db()
        self.assertEqual(self.user.password[:6], "pbkdf2")

    async def test_anonymous_user(self):
        user = AnonymousUser()
        calls = {
            **self.permission_calls(),
            "ahas_perms": lambda: user.ahas_perms(["auth.add_user"]),
            "ahas_module_perms": lambda: user.ahas_module_perms("auth"),
        }
        await self.check(AnonymousUser, calls, {"ahas_perms", "ahas_module_perms"})

    async def test_managers(self):
        users = User.objects
        await self.check(
            UserManager,
            {
                "acreate_user": lambda: users.acreate_user("a", password="p"),
                "acreate_superuser": lambda: users.acreate_superuser("b", password="p"),
                "aget_by_natural_key": lambda: users.aget_by_natural_key("user"),
            },
            of=Manager,
        )
        get_group = Group.objects.aget_by_natural_key
        calls = {"aget_by_natural_key": lambda: get_group("group")}
        await self.check(GroupManager, calls, of=Manager)
        await self.check(PermissionManager, {}, of=Manager)

    async def test_backends(self):
        backend = SyncBackend()
        calls = {
            **self.permission_calls(backend),
            "aauthenticate": lambda: backend.aauthenticate(None),
            "aget_user": lambda: backend.aget_user(self.user.pk),
        }
        await self.check(backends.BaseBackend, calls)

        model_backend = backends.ModelBackend()
        calls = {
            **self.permission_calls(model_backend, [("ahas_module_perms", "auth")]),
            "aauthenticate": lambda: model_backend.aauthenticate(None, "user", "p"),
            "aget_user": lambda: model_backend.aget_user(self.user.pk),
        }
        await self.check(backends.ModelBackend, calls)

        remote = backends.RemoteUserBackend()
        calls = {
            "aauthenticate": lambda: remote.aauthenticate(None, "remote"),
            "aconfigure_user": lambda: remote.aconfigure_user(None, self.user),
        }
        inherited = asynchronous_names(backends.ModelBackend) - set(calls)
        calls |= dict.fromkeys(inherited, lambda: remote.aget_user(self.user.pk))
        await self.check(backends.RemoteUserBackend, calls, {"aconfigure_user"})
