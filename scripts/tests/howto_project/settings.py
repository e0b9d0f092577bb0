import json
import os

DATABASES = json.loads(os.environ["DATABASES"])
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
INSTALLED_APPS = ["shop"]
SECRET_KEY = "tests"
USE_TZ = False
