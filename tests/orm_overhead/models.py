from django.db import models


class SharedQuerySetManager(models.Manager):
    """A manager whose methods all start from the same queryset."""

    def get_queryset(self):
        if not hasattr(self, "queryset"):
            self.queryset = super().get_queryset()
        return self.queryset


class Item(models.Model):
    name = models.CharField(max_length=100)
    parent = models.ForeignKey("self", models.CASCADE, null=True)

    shared = SharedQuerySetManager()
    objects = models.Manager()

    class Meta:
        base_manager_name = "shared"
        ordering = ["name"]
