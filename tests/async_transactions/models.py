from django.contrib.contenttypes.fields import GenericForeignKey, GenericRelation
from django.contrib.contenttypes.models import ContentType
from django.db import models


class Entry(models.Model):
    name = models.CharField(max_length=100, unique=True)
    count = models.IntegerField(default=0)
    tags = GenericRelation("Tag")


class EntryCountField(models.IntegerField):
    """Query before each save: its value is the number of entries."""

    def pre_save(self, model_instance, add):
        count = Entry.objects.count()
        setattr(model_instance, self.attname, count)
        return count


def write_and_cascade(collector, field, sub_objs, using):
    """Query and write on deletion, then do as CASCADE does."""
    for tag in sub_objs:
        Entry.objects.create(name=f"on_delete of {tag.name}")
    models.CASCADE(collector, field, sub_objs, using)


class Tag(models.Model):
    """Query and write wherever a model can, besides what it's asked for."""

    name = models.CharField(max_length=100)
    entries = EntryCountField()
    parent = models.ForeignKey("self", write_and_cascade, null=True)
    content_type = models.ForeignKey(ContentType, models.CASCADE, null=True)
    object_id = models.PositiveIntegerField(null=True)
    content_object = GenericForeignKey()

    def save(self, *args, **kwargs):
        Entry.objects.create(name=f"save() of {self.name}")
        super().save(*args, **kwargs)

    def delete(self, *args, **kwargs):
        Entry.objects.create(name=f"delete() of {self.name}")
        return super().delete(*args, **kwargs)


class Part(models.Model):
    entry = models.ForeignKey(Entry, models.CASCADE)
