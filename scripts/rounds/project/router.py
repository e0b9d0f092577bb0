"""Which models are in the other database."""

IN_OTHER = {"audit", "job"}


def alias_of(app_label, model_name):
    in_other = app_label == "shop" and model_name in IN_OTHER
    return "other" if in_other else "default"


class Router:
    def db_for_read(self, model, **hints):
        return alias_of(model._meta.app_label, model._meta.model_name)

    db_for_write = db_for_read

    def allow_migrate(self, db, app_label, model_name=None, **hints):
        return db == alias_of(app_label, model_name)
