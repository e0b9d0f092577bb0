from django.db import models


class Account(models.Model):
    name = models.CharField(max_length=100, unique=True)
    balance = models.IntegerField(default=0)


class Order(models.Model):
    name = models.CharField(max_length=100)


class LogEntry(models.Model):
    text = models.CharField(max_length=100)
