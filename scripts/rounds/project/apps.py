from django.apps import AppConfig


class ShopConfig(AppConfig):
    name = "rounds.project"
    label = "shop"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self):
        from rounds.project import signals, usage

        signals.connect()
        usage.connect()
