from django.db import models


class Account(models.Model):
    balance = models.IntegerField()

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=models.Q(balance__gte=0), name="balance_not_negative"
            )
        ]


class Entry(models.Model):
    name = models.CharField(max_length=100, unique=True)
    amount = models.IntegerField(default=0)


class Transfer(models.Model):
    id = models.UUIDField(primary_key=True)
    # They aren't foreign keys, which would lock the accounts.
    source = models.IntegerField()
    target = models.IntegerField()
    amount = models.IntegerField()
