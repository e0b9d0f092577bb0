"""
Do pieces of synchronous Django, for instructions.py, under callgrind.

    python micro.py URL REPETITIONS

Each is warmed up, then done REPETITIONS times, and then twice as often. Each
of these begins and ends with a call of getppid(), at which callgrind writes
down what has been executed so far. An empty URL means SQLite in memory.
"""

import gc
import os
import sys

from contenders.django_models import database_settings

import django
from django.conf import settings
from django.test import RequestFactory

ROWS = 20

# By then, caches are filled, and the bytecode is specialized.
WARM_UP = 20

# The cheap ones are done as often in one repetition, or what the interpreter
# does once in a while is too much of them.
OFTEN = 50

urlpatterns = []


def configure(url):
    """Set Django up, and return its model."""
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    settings.configure(
        DATABASES={
            "default": {
                **(database_settings(url) if url else database),
                "CONN_MAX_AGE": None,
            }
        },
        ALLOWED_HOSTS=["testserver"],
        ROOT_URLCONF=__name__,
        USE_TZ=True,
    )
    django.setup()
    from django.db import models

    class Item(models.Model):
        id = models.BigIntegerField(primary_key=True)
        name = models.CharField(max_length=100)
        price = models.IntegerField()

        class Meta:
            app_label = "bench"
            db_table = "bench_micro"

    return Item


def pieces(model):
    """Return what's measured: functions by name."""
    from django.core.handlers.wsgi import WSGIHandler
    from django.core.signals import request_finished, request_started
    from django.db import connection, connections, transaction
    from django.db.models.signals import pre_init
    from django.http import HttpResponse
    from django.urls import path

    item = model.objects.get(pk=1)
    environ = RequestFactory()._base_environ(PATH_INFO="/")
    urlpatterns.append(path("", lambda request: HttpResponse("")))
    handler = WSGIHandler()

    def look_up():
        for _ in range(OFTEN):
            connections["default"]

    def attribute():
        for _ in range(OFTEN):
            connection.vendor

    def send():
        for _ in range(OFTEN):
            pre_init.send(model)

    def cursor():
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            cursor.fetchone()

    def get():
        model.objects.get(pk=1)

    def read():
        list(model.objects.order_by("pk"))

    def iterate():
        for _ in model.objects.iterator(chunk_size=10):
            pass

    def save():
        item.save()

    def atomic():
        with transaction.atomic():
            pass

    def atomic_save():
        with transaction.atomic():
            item.save()

    def nested():
        with transaction.atomic(), transaction.atomic():
            pass

    def on_commit():
        with transaction.atomic():
            transaction.on_commit(str)

    def bulk():
        with transaction.atomic():
            model.objects.filter(pk__gt=ROWS).delete()
            model.objects.bulk_create(
                model(pk=ROWS + number, name="new", price=1)
                for number in range(1, ROWS + 1)
            )
            transaction.set_rollback(True)

    def request():
        request_started.send(sender=None, environ=environ)
        response = handler.get_response(handler.request_class(dict(environ)))
        response.close()
        request_finished.send(sender=None)

    return {
        f"look up a connection, {OFTEN} times": look_up,
        f"an attribute of connection, {OFTEN} times": attribute,
        f"a signal without receivers, {OFTEN} times": send,
        "cursor, execute(), fetchone()": cursor,
        "get()": get,
        f"list of {ROWS}": read,
        f"iterator() over {ROWS}, in chunks of 10": iterate,
        "save()": save,
        "atomic(), empty": atomic,
        "atomic() around a save()": atomic_save,
        "atomic() in atomic(), empty": nested,
        "atomic() with an on_commit()": on_commit,
        f"bulk_create() of {ROWS}": bulk,
        "a request, without a query": request,
    }


def repeat(piece, times):
    for _ in range(times):
        piece()


def main(url, repetitions):
    model = configure(url)
    from django.db import connection

    repetitions = int(repetitions)
    with connection.schema_editor() as editor:
        editor.create_model(model)
    try:
        model.objects.bulk_create(
            model(pk=number, name=f"item {number}", price=number)
            for number in range(1, ROWS + 1)
        )
        # A collection would be of whatever is there by then.
        gc.disable()
        for name, piece in pieces(model).items():
            print(name, flush=True)
            repeat(piece, WARM_UP)
            os.getppid()
            repeat(piece, repetitions)
            os.getppid()
            repeat(piece, 2 * repetitions)
            os.getppid()
    finally:
        with connection.schema_editor() as editor:
            editor.delete_model(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
