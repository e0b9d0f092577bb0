import json
import os

DATABASES = json.loads(os.environ["DATABASES"])
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
INSTALLED_APPS = ["entries"]
ROOT_URLCONF = "urls"
SECRET_KEY = "tests"
STATIC_URL = "static/"
USE_TZ = False
