from django.contrib.contenttypes.fields import GenericForeignKey, GenericRelation
from django.contrib.contenttypes.models import ContentType
from django.db import models


class Author(models.Model):
    name = models.CharField(max_length=100)
    created = models.DateField(null=True)


class Label(models.Model):
    name = models.CharField(max_length=100)
    content_type = models.ForeignKey(ContentType, models.CASCADE, null=True)
    object_id = models.PositiveIntegerField(null=True)
    content_object = GenericForeignKey()


class Book(models.Model):
    name = models.CharField(max_length=100)
    author = models.ForeignKey(Author, models.CASCADE, null=True)
    editors = models.ManyToManyField(Author, related_name="edited")
    labels = GenericRelation(Label)
