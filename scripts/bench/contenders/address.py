"""The address of the server, as each driver wants it."""

from urllib.parse import parse_qsl, unquote, urlsplit


def parameters(url):
    """Return what libpq calls host, port, user, password and dbname."""
    parts = urlsplit(url)
    found = {
        "host": parts.hostname,
        "port": parts.port,
        "user": parts.username,
        "password": parts.password,
        "dbname": parts.path.strip("/"),
        **dict(parse_qsl(parts.query)),
    }
    return {name: unquote(str(value)) for name, value in found.items() if value}
