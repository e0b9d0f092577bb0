from django.db.backends.postgresql import base


class Tenants:
    """What a wrapper has that refers to it."""

    def __init__(self, connection):
        self.connection = connection


class DatabaseWrapper(base.DatabaseWrapper):
    """
    Remember the tenant whose schema is used, and whether the session knows of
    it, as django-tenants does.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.schema_name = "public"
        self.search_path_set = False
        self.tenants = Tenants(self)

    def set_schema(self, schema_name):
        self.schema_name = schema_name
        self.search_path_set = False

    def close(self):
        self.search_path_set = False
        super().close()

    def rollback(self):
        self.search_path_set = False
        super().rollback()

    def _cursor(self, name=None):
        cursor = super()._cursor(name)
        if not self.search_path_set:
            with super()._cursor() as setting:
                schema_name = self.ops.quote_name(self.schema_name)
                setting.execute(f"SET search_path = {schema_name}")
            self.search_path_set = True
        return cursor
