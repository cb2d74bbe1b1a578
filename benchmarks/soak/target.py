# SPDX-License-Identifier: Apache-2.0
"""The server under test: requests to it, its metrics, the memory of its processes."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import psutil


class Target:
    """A running server; use as an async context.

    Attributes:
        model: the first served name.
        process: the server's process, or None if it is not on this machine.
    """

    def __init__(self, url: str, key: str | None, pid: int | None) -> None:
        self.url, self.model = url.rstrip("/"), ""
        self.process = psutil.Process(pid) if pid else None
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def __aenter__(self) -> "Target":
        self.session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=300),
            connector=aiohttp.TCPConnector(limit=0),
        )
        async with self.session.get(f"{self.url}/v1/models") as answer:
            if answer.status != 200:
                await self.session.close()
                sys.exit(f"{self.url} is not ready to be tested: {await answer.text()}")
            self.model = (await answer.json())["data"][0]["id"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def complete(self, max_tokens: int, **fields: Any) -> dict[str, Any]:
        """Send a completion; return status, whole body, and seconds to the end (and to the first event)."""
        body = {
            "model": self.model,
            "prompt": "hello",
            "max_tokens": max_tokens,
            "ignore_eos": True,
            **fields,
        }
        path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
        if "messages" in fields:
            del body["prompt"]
        start, first_s, text = time.perf_counter(), None, bytearray()
        async with self.session.post(self.url + path, json=body) as answer:
            async for part in answer.content.iter_any():
                first_s = first_s or time.perf_counter() - start
                text += part
            return {
                "status": answer.status,
                "text": bytes(text),
                "first_s": first_s or 0.0,
                "seconds": time.perf_counter() - start,
            }

    async def good(self) -> bool:
        """Return whether a good request is answered as it should be."""
        answer = await self.complete(4)
        return answer["status"] == 200 and json.loads(answer["text"])["usage"]["completion_tokens"] == 4

    async def metrics(self, *names: str) -> list[float]:
        """Return, for each of ``names``, the sum of the metric over all labels."""
        async with self.session.get(f"{self.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        sums = dict.fromkeys(names, 0.0)
        for line in lines:
            name = line.split("{")[0].split(" ")[0]
            if name in sums:
                sums[name] += float(line.split()[-1])
        return list(sums.values())

    async def running(self) -> tuple[float, float]:
        """Return the sequences that the server has admitted, and those that vLLM runs or has waiting."""
        admitted, *inside = await self.metrics(
            "pvq_server_sequences", "vllm:num_requests_running", "vllm:num_requests_waiting"
        )
        return admitted, sum(inside)

    async def seconds_until_idle(self, limit_s: float) -> float | None:
        """Return how long it took until nothing ran; None if it took longer than ``limit_s``."""
        start = time.perf_counter()
        while (seconds := time.perf_counter() - start) < limit_s:
            if await self.running() == (0, 0):
                return seconds
            await asyncio.sleep(0.05)
        return None

    def memory_bytes(self) -> int | None:
        """Return the memory of the server and its engine: resident, shared pages counted once (PSS)."""
        return self._sum(lambda process: process.memory_full_info().pss)

    def open_files(self) -> int | None:
        """Return the open descriptors of the server and its engine."""
        return self._sum(psutil.Process.num_fds)

    def _sum(self, measure: Callable[[psutil.Process], int]) -> int | None:
        if self.process is None:
            return None
        total = measure(self.process)
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # a short-lived one
                total += measure(child)
        return total
