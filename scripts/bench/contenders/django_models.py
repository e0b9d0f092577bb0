"""Django's settings and models. django is imported before it is configured."""

import django
from django.conf import settings

from .address import parameters


def configure(url, engine="django.db.backends.postgresql", apps=(), **database):
    default = database_settings(url)
    default["OPTIONS"].update(database.pop("OPTIONS", {}))
    settings.configure(
        DATABASES={"default": {**default, "ENGINE": engine, **database}},
        INSTALLED_APPS=list(apps),
        ALLOWED_HOSTS=["127.0.0.1"],
        ROOT_URLCONF="contenders.django_http",
        USE_TZ=True,
    )
    django.setup()


def database_settings(url):
    address = parameters(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": address.pop("dbname"),
        "USER": address.pop("user", ""),
        "PASSWORD": address.pop("password", ""),
        "HOST": address.pop("host", ""),
        "PORT": address.pop("port", ""),
        "OPTIONS": address,
    }


def models(manager=None):
    """Return the models, in a namespace."""
    from types import SimpleNamespace

    from django.db import models

    def model(name, table, /, **fields):
        if manager is not None:
            fields["async_objects"] = manager()
        meta = type("Meta", (), {"app_label": "bench", "db_table": table})
        members = {"__module__": __name__, "Meta": meta, **fields}
        return type(name, (models.Model,), members)

    def item(name, table):
        return model(
            name,
            table,
            id=models.BigIntegerField(primary_key=True),
            name=models.CharField(max_length=100),
            price=models.IntegerField(),
            created=models.DateTimeField(),
            note=models.TextField(),
        )

    def account(name, table):
        return model(
            name,
            table,
            id=models.BigIntegerField(primary_key=True),
            balance=models.BigIntegerField(),
        )

    def of_author(name, table, related_name):
        return model(
            name,
            table,
            id=models.BigIntegerField(primary_key=True),
            author=models.ForeignKey(author, models.CASCADE, related_name=related_name),
            title=models.CharField(max_length=100),
        )

    author = model(
        "Author",
        "bench_author",
        id=models.BigIntegerField(primary_key=True),
        name=models.CharField(max_length=100),
    )
    return SimpleNamespace(
        Item=item("Item", "bench_item"),
        SlowItem=item("SlowItem", "bench_slow_item"),
        Account=account("Account", "bench_account"),
        SlowAccount=account("SlowAccount", "bench_slow_account"),
        Entry=model(
            "Entry",
            "bench_entry",
            id=models.BigAutoField(primary_key=True),
            account_id=models.BigIntegerField(),
            amount=models.IntegerField(),
        ),
        Author=author,
        Book=of_author("Book", "bench_book", "books"),
        Award=of_author("Award", "bench_award", "awards"),
    )
