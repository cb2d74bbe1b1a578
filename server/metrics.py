# SPDX-License-Identifier: Apache-2.0
"""The server's own metrics. They are in prometheus_client's registry, where vLLM's are, and so on one page /metrics."""

from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

REQUESTS = Counter("pvq_server_requests", "Requests that ended.", ("method", "route", "status"))
SECONDS = Histogram(
    "pvq_server_request_seconds",
    "From a request's head to the end of its answer.",
    ("route",),
    buckets=_SECONDS,
)
FIRST_BYTE_SECONDS = Histogram(
    "pvq_server_first_byte_seconds",
    "From a request's head to the first byte of its answer's body.",
    ("route",),
    buckets=_SECONDS,
)
REJECTED = Counter("pvq_server_rejected", "Requests refused before they reached the engine.", ("reason",))
DISCONNECTED = Counter("pvq_server_disconnected", "Requests whose client left before the end of the answer.")
SEQUENCES = Gauge("pvq_server_sequences", "Sequences admitted and not yet answered.")
SEQUENCES_MAX = Gauge("pvq_server_sequences_max", "Most sequences that are admitted at a time.")
CONNECTIONS_CLOSED = Counter(
    "pvq_server_connections_closed", "Connections that the server closed on a client.", ("reason",)
)
READY = Gauge("pvq_server_ready", "1 while the server takes requests.")
RESTARTS = Gauge("pvq_server_restarts", "Restarts after a death of the engine, in the last ten minutes.")
API_KEYS = Gauge("pvq_server_api_keys", "API keys that are valid now.")

__all__ = ["CONTENT_TYPE_LATEST", "generate_latest"]
