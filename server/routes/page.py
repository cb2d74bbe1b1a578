# SPDX-License-Identifier: Apache-2.0
"""The page at ``/``: three static files that show what /metrics, /ready, /pvq/info and /v1/models say and
send a prompt.

The files hold no data and are served to all who can connect; what they show asks for the key of the server
like every other client. They load nothing from elsewhere and the policy in ``HEADERS`` holds them to that.
"""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

FOLDER = Path(__file__).resolve().parent.parent / "static"

HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "img-src data:",  # the icon, which is in the HTML
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # after an upgrade the three files must fit together
}

page_router = APIRouter(include_in_schema=False)


def _file(name: str, media_type: str) -> FileResponse:
    return FileResponse(FOLDER / name, media_type=media_type, headers=HEADERS)


@page_router.api_route("/", methods=["GET", "HEAD"])
async def page() -> FileResponse:
    """The page itself."""
    return _file("page.html", "text/html")


@page_router.api_route("/page.css", methods=["GET", "HEAD"])
async def style() -> FileResponse:
    """How the page looks."""
    return _file("page.css", "text/css")


@page_router.api_route("/page.js", methods=["GET", "HEAD"])
async def script() -> FileResponse:
    """What the page does."""
    return _file("page.js", "text/javascript")
