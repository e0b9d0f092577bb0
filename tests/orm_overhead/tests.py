from django.db import connection, models
from django.db.models import Count, ExpressionWrapper, F, Q, Value, Window
from django.db.models.base import ModelState
from django.db.models.functions import Concat, RowNumber, Upper
from django.db.models.signals import post_init, pre_init
from django.db.models.sql.compiler import cursor_iter
from django.test import TestCase, skipUnlessDBFeature

from .models import Item


class CountingCursor:
    """A cursor that counts how often rows were fetched."""

    def __init__(self, cursor):
        self.cursor = cursor
        self.fetches = 0
        self.is_closed = False

    def fetchmany(self, size):
        self.fetches += 1
        return self.cursor.fetchmany(size)

    def close(self):
        self.is_closed = True
        self.cursor.close()


class OverheadTests(TestCase):
    @classmethod
    def setUpTestData(cls):
        cls.items = [Item.objects.create(name=name) for name in "abcde"]

    def test_get_leaves_ordering(self):
        queryset = Item.objects.order_by("-name")
        self.assertEqual(queryset.get(name="b"), self.items[1])
        self.assertEqual(list(queryset), self.items[::-1])

    def test_cursor_iter_fetches(self):
        for limit, fetches in [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3)]:
            with self.subTest(limit=limit):
                sql, params = Item.objects.values("name").query.sql_with_params()
                cursor = connection.cursor()
                cursor.execute(f"{sql} LIMIT {limit}", params)
                counting = CountingCursor(cursor)
                sentinel = connection.features.empty_fetchmany_value
                batches = list(cursor_iter(counting, sentinel, None, 2))
                names = "".join(name for rows in batches for (name,) in rows)
                self.assertEqual(names, "abcde"[:limit])
                self.assertEqual(counting.fetches, fetches)
                self.assertIs(counting.is_closed, True)

    def test_receivers_connected_later(self):
        for signal in (pre_init, post_init):
            with self.subTest(signal=signal):
                Item.objects.first()
                received = []

                def receiver(sender, **kwargs):
                    received.append(sender)

                signal.connect(receiver, sender=Item)
                try:
                    Item(name="x")
                    list(Item.objects.all()[:2])
                finally:
                    signal.disconnect(receiver, sender=Item)
                self.assertEqual(received, [Item] * 3)
                Item(name="y")
                self.assertEqual(len(received), 3)

    def test_column_shared_by_queries(self):
        column = Item._meta.get_field("name").cached_col
        inner = Item.objects.filter(name="b")
        self.assertIs(inner.query.where.children[0].lhs, column)
        # The alias of the inner query's table is changed.
        outer = Item.objects.filter(name="b", pk__in=inner)
        self.assertEqual(outer.get(), self.items[1])
        children = Item.objects.filter(name="b", parent__name="b")
        self.assertIs(children.exists(), False)
        self.assertEqual(column.alias, Item._meta.db_table)
        self.assertEqual(inner.get(), self.items[1])

    def test_summarized_column_is_a_copy(self):
        column = Item._meta.get_field("name").cached_col
        self.assertIs(column.resolve_expression(), column)
        summarized = column.resolve_expression(summarize=True)
        self.assertIsNot(summarized, column)
        self.assertEqual((summarized.is_summary, column.is_summary), (True, False))

    def test_save_leaves_queryset_of_base_manager(self):
        for item in self.items:
            item.name *= 2
            item.save()
        self.assertEqual(
            list(Item.objects.values_list("name", flat=True)),
            ["aa", "bb", "cc", "dd", "ee"],
        )
        self.assertEqual(Item._base_manager.get_queryset().count(), 5)

    def test_state_without_related_objects(self):
        state = ModelState()
        state.__del__()
        self.assertNotIn("fields_cache", state.__dict__)

    def test_state_with_related_objects(self):
        child = Item.objects.create(name="f", parent=self.items[0])
        cache = child._state.fields_cache
        self.assertEqual(cache, {"parent": self.items[0]})
        child._state.__del__()
        self.assertEqual(cache, {})

    def test_aggregate_within_filter(self):
        Item.objects.create(name="f", parent=self.items[1])
        counted = Item.objects.annotate(children=Count("item"))
        for condition, names in [
            (Q(children=1), "b"),
            (Q(name="c") | Q(children=1), "bc"),
            (Q(pk__gt=0) & (Q(name="c") | ~Q(children=0)), "bc"),
            (Q(pk=F("pk") + F("children"), name__lt="c"), "a"),
        ]:
            with self.subTest(condition=condition):
                queryset = counted.filter(condition)
                self.assertEqual("".join(item.name for item in queryset), names)

    @skipUnlessDBFeature("supports_over_clause")
    def test_window_within_filter(self):
        numbered = Item.objects.annotate(
            number=Window(RowNumber(), order_by="name")
        ).filter(Q(pk__gt=0) & Q(Q(number=2) | Q(number__gt=F("pk") * 0 + 4)))
        self.assertEqual([item.name for item in numbered], ["b", "e"])

    def test_contains_aggregate_of_where(self):
        plain = Item.objects.filter(name="a").query.where
        self.assertIs(plain.contains_aggregate, False)
        self.assertIs(plain.contains_over_clause, False)
        counted = Item.objects.annotate(children=Count("item"))
        having = counted.filter(Q(name="a") | Q(children=1)).query.where
        self.assertIs(having.contains_aggregate, True)
        self.assertIs(having.contains_over_clause, False)

    def test_insert_of_values_and_expressions(self):
        created = Item.objects.bulk_create(
            [
                Item(name="v", parent=self.items[0]),
                Item(name=Concat(Value("w"), Value("x"))),
                Item(name=Upper(Value("y")), parent_id=self.items[1].pk),
            ]
        )
        self.assertEqual(len(created), 3)
        self.assertCountEqual(
            Item.objects.exclude(pk__in=[item.pk for item in self.items]).values_list(
                "name", "parent__name"
            ),
            [("v", "a"), ("wx", None), ("Y", "b")],
        )
        item = Item.objects.create(name=Concat(Value("z"), Upper(Value("z"))))
        self.assertEqual(item.name, "zZ")
        msg = "F() expressions can only be used to update, not to insert."
        with self.assertRaisesMessage(ValueError, msg):
            Item.objects.create(name=F("name"))

    def test_field_formats_column(self):
        class UpperField(models.CharField):
            def select_format(self, compiler, sql, params):
                return f"UPPER({sql})", params

        upper = ExpressionWrapper(F("name"), output_field=UpperField())
        names = Item.objects.annotate(upper=upper).values_list("upper", flat=True)
        self.assertEqual("".join(names), "ABCDE")
