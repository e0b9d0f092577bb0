"""
Create the tables, and what's in them before the first request.
"""

import django
from django.conf import settings
from django.core.management import call_command


def prepare():
    from rounds.project.models import Item, Product

    from django.contrib.auth.models import User

    for alias in settings.DATABASES:
        call_command("migrate", run_syncdb=True, database=alias, verbosity=0)
    for name in settings.OPTIONS["users"]:
        is_staff = name == "staff"
        User.objects.create_user(
            name, password=name, is_staff=is_staff, is_superuser=is_staff
        )
    Product.objects.bulk_create(
        Product(name=f"product {number}", stock=settings.OPTIONS["stock"])
        for number in range(settings.OPTIONS["products"])
    )
    Item.objects.bulk_create(
        Item(text=f"item {number} ".ljust(200, "."))
        for number in range(settings.OPTIONS["items"])
    )


if __name__ == "__main__":
    django.setup()
    prepare()
