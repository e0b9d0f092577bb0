from rounds.project.models import Notice, Order

from django.contrib import admin


@admin.register(Notice)
class NoticeAdmin(admin.ModelAdmin):
    search_fields = ["name"]


@admin.register(Order)
class OrderAdmin(admin.ModelAdmin):
    list_display = ["name", "user", "is_complete"]
    list_filter = ["is_complete"]
