"""
A shop.

What requests create is named by who requests it: the client knows from the
response what has to be there, and what mustn't.
"""

from django.conf import settings
from django.db import models


class Product(models.Model):
    name = models.CharField(max_length=40)
    stock = models.IntegerField()

    class Meta:
        constraints = [
            models.CheckConstraint(condition=models.Q(stock__gte=0), name="stocked")
        ]


class Order(models.Model):
    name = models.CharField(max_length=40, unique=True)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, null=True)
    # Set by the last statement of the transaction that has created it.
    is_complete = models.BooleanField(default=False)


class Line(models.Model):
    order = models.ForeignKey(Order, models.CASCADE)
    product = models.ForeignKey(Product, models.CASCADE)
    quantity = models.IntegerField()


class Gift(models.Model):
    """What a nested block creates, and is then rolled back."""

    order = models.ForeignKey(Order, models.CASCADE)


class Event(models.Model):
    """What receivers of signals have seen."""

    order = models.ForeignKey(Order, models.CASCADE)
    kind = models.CharField(max_length=10)


class Login(models.Model):
    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)
    kind = models.CharField(max_length=10)


class Visit(models.Model):
    """What middleware has seen of a request."""

    name = models.CharField(max_length=40, unique=True)
    status = models.IntegerField(null=True)


class Item(models.Model):
    """A row of a download."""

    text = models.CharField(max_length=200)


class Message(models.Model):
    """What came by a websocket."""

    name = models.CharField(max_length=40, unique=True)


class Notice(models.Model):
    """What the admin adds."""

    name = models.CharField(max_length=40, unique=True)

    def __str__(self):
        return self.name


class Audit(models.Model):
    """What on_commit() was told. In the other database."""

    name = models.CharField(max_length=40)


class Job(models.Model):
    """What tasks have done after their request. In the other database."""

    name = models.CharField(max_length=40)
    kind = models.CharField(max_length=20)
