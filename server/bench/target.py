# SPDX-License-Identifier: Apache-2.0
"""The servers under test: what they serve and with which vocabulary."""

import dataclasses
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2

from server.bench.workload import WORDS, Vocabulary
from server.errors import ServerError

_CONNECT_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True)
class Target:
    """A server under test: label in the results, base URL, name of the model in requests, API key if any,
    vocabulary for random prompts, and what the server says of itself.
    """

    label: str
    url: str
    model: str
    api_key: str | None = dataclasses.field(default=None, repr=False)
    vocabulary: Vocabulary = dataclasses.field(default_factory=Vocabulary, repr=False)
    info: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """The header with the API key, if there is one."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def facts(self) -> dict[str, Any]:
        """Return what goes into the results: everything but the key and the vocabulary."""
        return {"label": self.label, "url": self.url, "model": self.model, "info": self.info}


def find_target(url: str, api_key: str | None, model: str | None = None, label: str | None = None) -> Target:
    """Ask the server at ``url`` what it serves; ``model`` overrules the first of its answer.

    Raises:
        ServerError: nothing answers there, the key is refused, or the model is not served.
    """
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx2.get(f"{url}/v1/models", headers=headers, timeout=_CONNECT_TIMEOUT_S)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ServerError(
            f"--url {url}: no server answers there ({error}): start one with pvq serve MODEL"
        ) from None
    if response.status_code in (401, 403):
        raise ServerError(f"--url {url}: the server refuses the API key: set PVQ_API_KEY to its key")
    if response.status_code == 503:
        raise ServerError(f"--url {url}: the server is not ready (status 503): wait until it is")
    try:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}")
        served = [entry["id"] for entry in response.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(
            f"--url {url}: /v1/models does not answer like an OpenAI server ({error}): check the address"
        ) from None
    name = model or next(iter(served), None)
    if name not in served:
        raise ServerError(f"--model {name} is not served at {url}: give one of {', '.join(served) or 'none'}")
    target = Target(label or name, url, name, api_key)
    return dataclasses.replace(target, vocabulary=_vocabulary(target), info=_info(target))


def find_targets(
    urls: Sequence[str], labels: Sequence[str], models: Sequence[str], api_key: str | None
) -> list[Target]:
    """Return one target for each URL, with labels that differ.

    A label that is not given is the model's name, or the address where several serve a model of that name.
    One model stands for all URLs.

    Raises:
        ServerError: the numbers do not fit, labels repeat, or a server does not answer.
    """
    if labels and len(labels) != len(urls):
        raise ServerError(f"{len(labels)} --label for {len(urls)} --url: give one label for each URL")
    if len(models) not in (0, 1, len(urls)):
        raise ServerError(f"{len(models)} --model for {len(urls)} --url: give one for all, or one each")
    names = list(models) * len(urls) if len(models) == 1 else list(models) or [None] * len(urls)
    targets = [find_target(url, api_key, name) for url, name in zip(urls, names, strict=True)]
    if not labels:
        labels = [target.label for target in targets]
        if len(set(labels)) < len(labels):
            labels = [urlsplit(target.url).netloc for target in targets]
    if len(set(labels)) < len(labels):
        raise ServerError(
            f"the labels {', '.join(labels)} do not differ: give one --label NAME for each --url"
        )
    return [dataclasses.replace(target, label=label) for target, label in zip(targets, labels, strict=True)]


def _ask(target: Target, method: str, path: str, **request: Any) -> Any:
    """Return the JSON of the answer; None if the server has no such route or refuses."""
    try:
        answer = httpx2.request(
            method, target.url + path, headers=target.headers, timeout=_CONNECT_TIMEOUT_S, **request
        )
        return answer.raise_for_status().json()
    except (httpx2.HTTPError, ValueError):
        return None


def _vocabulary(target: Target) -> Vocabulary:
    """Return the tokens of WORDS by vLLM's /tokenize; where there is none, a token a word is assumed."""
    body = {"model": target.model, "prompt": " ".join(WORDS), "add_special_tokens": False}
    answer = _ask(target, "POST", "/tokenize", json=body)
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, int) for token in tokens):
        return Vocabulary()
    return Vocabulary(tuple(dict.fromkeys(tokens)), len(tokens) / len(WORDS))


def _info(target: Target) -> dict[str, Any]:
    """Return what ``pvq serve`` says of its model, or nothing for another server."""
    answer = _ask(target, "GET", "/pvq/info")
    return answer if isinstance(answer, dict) else {}
