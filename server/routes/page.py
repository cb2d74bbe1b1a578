# SPDX-License-Identifier: Apache-2.0
"""The page at ``/``: static files that show what /metrics, /ready, /pvq/info and /v1/models say and send a prompt.

The files hold no data and are served to all who can connect; what they show asks for the key of the server
like every other client. They load nothing from elsewhere and the policy in ``HEADERS`` holds them to that.
"""

from pathlib import Path

from fastapi import APIRouter, HTTPException
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
    "Cache-Control": "no-cache",  # after an upgrade the files must fit together
}

_TYPES = {".css": "text/css", ".js": "text/javascript"}
_PARTS = {path.name: _TYPES[path.suffix] for path in FOLDER.iterdir() if path.suffix in _TYPES}

PATHS = frozenset({"/", *(f"/page/{name}" for name in _PARTS)})
"""All that a browser asks for to show the page; open to all."""

page_router = APIRouter(include_in_schema=False)


@page_router.api_route("/", methods=["GET", "HEAD"])
async def page() -> FileResponse:
    """The page itself."""
    return FileResponse(FOLDER / "page.html", media_type="text/html", headers=HEADERS)


@page_router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def part(name: str) -> FileResponse:
    """A style sheet or script of the page."""
    if name not in _PARTS:
        raise HTTPException(404)
    return FileResponse(FOLDER / name, media_type=_PARTS[name], headers=HEADERS)
