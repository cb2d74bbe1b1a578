# SPDX-License-Identifier: Apache-2.0
"""Log lines, as text or as one JSON object each, from this server, uvicorn, vLLM and its engine processes."""

import json
import logging
import logging.config
import os
import time
from pathlib import Path

_CONFIG_FOR_VLLM = Path(__file__).parent / "logs_vllm.json"
"""vLLM reads this in every one of its processes and finds ``JSONFormatter`` in it."""


class JSONFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, pid, message, and what ``extra={"facts": {...}}`` adds.

    A process that makes one logs Python's warnings, which would otherwise be printed as text.
    """

    def __init__(self) -> None:
        super().__init__()
        # Here, because of this package only the formatter is made in every one of vLLM's processes.
        logging.captureWarnings(True)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for ``record``."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict):
            line |= facts
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(log_format: str) -> None:
    """Set logging up for this process and, by the environment, for those of vLLM; call before vLLM is imported.

    A logging configuration that the user gives vLLM (VLLM_LOGGING_CONFIG_PATH) stays.
    """
    if log_format == "json":
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(_CONFIG_FOR_VLLM))
    formatters = {
        "text": {"format": "%(levelname)s %(asctime)s %(message)s", "datefmt": "%m-%d %H:%M:%S"},
        "json": {"()": JSONFormatter},
    }
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"pvq": formatters[log_format]},
            "handlers": {"pvq": {"class": "logging.StreamHandler", "formatter": "pvq"}},
            "loggers": {
                name: {"handlers": ["pvq"], "level": level, "propagate": False}
                for name, level in (("pvq", "INFO"), ("uvicorn", "INFO"), ("py.warnings", "WARNING"))
            },
            "root": {"handlers": ["pvq"], "level": "WARNING"},
        }
    )
