"""Settings of the shop. Its tables live in the database of the bus, so that one transaction spans both."""

import os

from psycopg.conninfo import conninfo_to_dict

_conninfo = conninfo_to_dict(os.environ["COMMAND_BUS_DSN"])

SECRET_KEY = os.environ.get("SECRET_KEY", "only for trying it out")
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
INSTALLED_APPS = ["shop"]
ROOT_URLCONF = "shop.urls"
WSGI_APPLICATION = "shop.wsgi.application"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _conninfo.pop("dbname"),
        "OPTIONS": _conninfo,
    }
}
