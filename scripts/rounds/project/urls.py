from rounds.project import views

from django.contrib import admin
from django.urls import path

urlpatterns = [
    path("admin/", admin.site.urls),
    *[
        path(f"{view.__name__}/", view)
        for view in [
            views.browse,
            views.buy,
            views.buy_async,
            views.buy_crossing,
            views.buy_run_sync,
            views.export,
            views.fail,
            views.fail_async,
            views.gather,
            views.job,
            views.sign_in,
            views.sign_in_async,
            views.sign_out,
            views.slow,
            views.whoami,
            views.whoami_async,
        ]
    ],
]
