"""
Receivers of both colours. All of them write.
"""

from rounds.project.models import Event, Login, Order

from django.contrib.auth.signals import user_logged_in
from django.db.models.signals import post_save


def order_saved(sender, instance, created, **kwargs):
    if created:
        Event.objects.create(order=instance, kind="sync")


async def aorder_saved(sender, instance, created, **kwargs):
    if created:
        await Event.objects.acreate(order=instance, kind="async")


def logged_in(sender, user, **kwargs):
    Login.objects.create(user=user, kind="sync")


async def alogged_in(sender, user, **kwargs):
    await Login.objects.acreate(user=user, kind="async")


def connect():
    for receiver in (order_saved, aorder_saved):
        post_save.connect(receiver, sender=Order)
    for receiver in (logged_in, alogged_in):
        user_logged_in.connect(receiver)
