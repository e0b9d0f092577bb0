"""
The settings of the project. What a round decides comes from the environment.
"""

import json
import os

OPTIONS = json.loads(os.environ["GAUNTLET_PROJECT"])

DATABASES = OPTIONS["databases"]
DATABASE_ROUTERS = ["rounds.project.router.Router"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "rounds.project.apps.ShopConfig",
]

MIDDLEWARE = [
    "django.middleware.common.CommonMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    *OPTIONS["middleware"],
]

# The tables are created without migrations, which takes a second, not ten.
MIGRATION_MODULES = {
    label: None
    for label in ("admin", "auth", "contenttypes", "messages", "sessions", "shop")
}

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

# Whatever is logged is a finding, except for the views' own failures.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"unexpected": {"()": "rounds.project.usage.Unexpected"}},
    "handlers": {
        "console": {"class": "logging.StreamHandler", "filters": ["unexpected"]},
    },
    "loggers": {"django": {"handlers": [], "propagate": True}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}

ALLOWED_HOSTS = ["127.0.0.1"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
ROOT_URLCONF = "rounds.project.urls"
SECRET_KEY = "gauntlet"
SESSION_ENGINE = "django.contrib.sessions.backends." + OPTIONS["sessions"]
STATIC_URL = "static/"
USE_TZ = True
