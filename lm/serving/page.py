"""The web page of the server: files as they stand, which need nothing from elsewhere."""

import importlib.resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# The browser runs and shows what the server sends and nothing else, whatever a model writes.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
FILES = (
    "page.html",
    "page.css",
    "page.js",
    "page_client.js",
    "page_settings.js",
    "page_tokens.js",
)


def _file(request: Request) -> Response:
    name = request.url.path.rpartition("/")[2] or FILES[0]
    content = importlib.resources.files("lm.serving").joinpath(name).read_bytes()
    return Response(content, media_type=TYPES[name.rpartition(".")[2]], headers=HEADERS)


ROUTES = [Route(path, _file) for path in ("/", *(f"/{name}" for name in FILES[1:]))]
