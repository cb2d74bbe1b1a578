# SPDX-License-Identifier: Apache-2.0
"""Ends a request whose client has left, so that its place in the engine is free at once.

Starlette would cancel a streamed answer with anyio, which cancels a task again and again until it has ended, once
in every turn of the event loop. vLLM's task has to wait for the engine before it can end, so with a few hundred clients that
leave together the loop did nothing else and the answers ran on for half a minute. Here the task is cancelled once.
"""

import asyncio
import contextlib

from server.asgi import App, Message, Receive, Scope, Send

_POLL_S = 0.05


async def run_while_connected(app: App, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Run ``app`` for a request whose whole ``body`` is here; end it when the client leaves.

    Before the answer has begun the app is told (http.disconnect), as vLLM's routes expect; after that it is cancelled.
    """
    left = asyncio.Event()
    given = begun = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            await left.wait()
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send_noting(message: Message) -> None:
        nonlocal begun
        begun = True
        await send(message)

    async def wait_until_left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    # From 2.4 on Starlette leaves it to the server to end a streamed answer.
    scope["asgi"] = {**scope.get("asgi", {}), "spec_version": "2.4"}
    answer = asyncio.ensure_future(app(scope, receive_again, send_noting))
    watch = asyncio.ensure_future(wait_until_left())
    try:
        await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            left.set()
            cancelled = False
            while not answer.done():
                if begun and not cancelled:
                    cancelled = answer.cancel()
                await asyncio.wait({answer}, timeout=_POLL_S)
    except asyncio.CancelledError:  # the server ends
        answer.cancel()
        await asyncio.wait({answer})
        raise
    finally:
        watch.cancel()
    with contextlib.suppress(*[asyncio.CancelledError] if left.is_set() else []):
        answer.result()
