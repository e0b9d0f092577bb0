"""Django's synchronous ORM, in threads that each keep a connection."""

from operations import AUTHORS_READ, BULK_SIZE, LIST_SIZE, SLEEP

from . import django_models


class Contender:
    threads = 10

    def __init__(self, url):
        django_models.configure(url, CONN_MAX_AGE=None)
        self.models = django_models.models()

    def open(self):
        """Connect the current thread."""
        from django.db import connection

        connection.ensure_connection()

    def close(self):
        from django.db import connection

        connection.close()

    def get(self, key):
        return self.models.Item.objects.get(pk=key)

    def slow_get(self, key):
        return self.models.SlowItem.objects.get(pk=key)

    def list(self, start):
        items = self.models.Item.objects.filter(pk__gte=start, pk__lt=start + LIST_SIZE)
        return [item for item in items.order_by("pk")]

    def transaction(self, key):
        self._transaction(self.models.Account, key)

    def slow_transaction(self, key):
        self._transaction(self.models.SlowAccount, key)

    def _transaction(self, model, key):
        from django.db import transaction

        with transaction.atomic():
            account = model.objects.select_for_update().get(pk=key)
            account.balance += 1
            account.save(update_fields=["balance"])
            self.models.Entry.objects.create(account_id=key, amount=1)

    def hold(self, key, wait):
        from django.db import transaction

        with transaction.atomic():
            self.models.Account.objects.select_for_update().get(pk=key)
            wait()

    def prefetch(self, start):
        authors = self.models.Author.objects.filter(
            pk__gte=start, pk__lt=start + AUTHORS_READ
        )
        authors = authors.order_by("pk").prefetch_related("books", "awards")
        return [
            (author, list(author.books.all()), list(author.awards.all()))
            for author in authors
        ]

    def bulk(self, key):
        entries = [
            self.models.Entry(account_id=key, amount=1) for _ in range(BULK_SIZE)
        ]
        self.models.Entry.objects.bulk_create(entries)

    def stream(self):
        count = total = 0
        for item in self.models.Item.objects.iterator(chunk_size=2000):
            count += 1
            total += item.pk
        return count, total

    def sleep(self):
        from django.db import connection

        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(%s)", [SLEEP])
