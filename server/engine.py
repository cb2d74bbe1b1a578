# SPDX-License-Identifier: Apache-2.0
"""vLLM behind this project's routes: arguments, engine, app and life cycle. The only file of this package
that imports vLLM.

The app is vLLM's own OpenAI app with routes added to it, so that everything vLLM can do (chat, completions,
streaming, tools, structured output, metrics) is there unchanged. Written for vLLM 0.24 to 0.33; where names
moved in between, ``_PLACES`` lists them.
"""

import argparse
import asyncio
import contextlib
import importlib
import logging
import multiprocessing.util
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import uvloop
from pydantic import ValidationError

from server import logs
from server.admission import Limits
from server.app import add_routes, add_state
from server.errors import ServerError
from server.http import Drain, LoadingServer, guard, make_server
from server.keys import KeyStore
from server.model import read_config
from server.restart import WINDOW_S, end_children, exit_at_the_latest, recent, restart
from server.settings import Settings
from server.state import Phase, ServerState

_PLACES = {  # newest first: 0.33, 0.32, 0.24
    "make_arg_parser": (
        "entrypoints.common.cli_args",
        "entrypoints.launchers.cli_args",
        "entrypoints.openai.cli_args",
    ),
    "validate_parsed_serve_args": (
        "entrypoints.common.cli_args",
        "entrypoints.launchers.cli_args",
        "entrypoints.openai.cli_args",
    ),
    "build_async_engine_client": ("entrypoints.launchers.api_server.entry", "entrypoints.openai.api_server"),
    "build_app": ("entrypoints.launchers.app", "entrypoints.openai.api_server"),
    "init_app_state": ("entrypoints.launchers.api_server.app_state", "entrypoints.openai.api_server"),
    "ToolParserManager": ("tool_parsers", "entrypoints.openai.tool_parsers"),
    "ReasoningParserManager": ("reasoning",),
}
_REPLACED_FLAGS = {
    "--allowed-origins": "give --cors-origins",
    "--allowed-methods": "--cors-origins allows all methods",
    "--allowed-headers": "--cors-origins allows all headers",
    "--allow-credentials": "keys come in the header Authorization, not in cookies: leave it out",
    "--ssl-cert-reqs": "--ssl-ca-certs asks for certificates of clients",
    "--ssl-ciphers": "put a proxy in front that ends TLS",
    "--enable-ssl-refresh": "restart the server for a new certificate",
    "--disable-uvicorn-access-log": "give --no-access-log",
    "--disable-access-log-for-endpoints": "probes are not logged in any case: leave it out",
    "--enable-request-id-headers": "the header is always there: leave it out",
    "--h11-max-incomplete-event-size": "heads end at 64 KiB, bodies at --max-body-bytes",
    "--h11-max-header-count": "heads end at 64 KiB",
}
"""Flags of vLLM's HTTP server, which is not used here: an error is better than a limit that is not there."""

_VLLM_KEY = "VLLM_API_KEY"
_OPEN_FILES = 65535
_ENGINE_CHECK_INTERVAL_S = 0.2
_FAILED_TIMEOUT_S = 2.0
"""Seconds for clients to take their error after the engine has died."""

_CLEAN_UP_TIMEOUT_S = 30.0

logger = logging.getLogger("pvq.engine")


def _from_vllm(name: str) -> Any:
    """Return ``name`` from the first place that has it; raise the last ImportError or AttributeError if none
    has.
    """
    failure: Exception = KeyError(name)
    for place in _PLACES[name]:
        try:
            return getattr(importlib.import_module(f"vllm.{place}"), name)
        except (ImportError, AttributeError) as error:
            failure = error
    raise failure


def parse_arguments(model: str, settings: Settings, flags: Sequence[str]) -> argparse.Namespace:
    """Return vLLM's arguments for ``model`` with ``flags`` of ``vllm serve``; an unknown flag ends the
    process with usage and status 2.

    Raises:
        ServerError: the flags contradict each other, or ask for more than one API server in one process.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for flag in flags:
        instead = _REPLACED_FLAGS.get(flag.partition("=")[0].replace("_", "-"))
        if instead:
            raise ServerError(f"{flag.partition('=')[0]} of vLLM has no effect in pvq serve: {instead}")
    parser = _from_vllm("make_arg_parser")(
        FlexibleArgumentParser(prog="pvq serve", description="Flags of vLLM.")
    )
    args = parser.parse_args([model, *flags])
    args.model = model
    args.host, args.port = settings.host, settings.port
    for name, reason in (
        ("uds", "a socket file"),
        ("headless", "an engine without a server"),
        ("grpc", "gRPC"),
    ):
        if getattr(args, name, None):
            raise ServerError(
                f"--{name} asks for {reason}, which pvq serve does not offer: use vLLM's own serve command"
            )
    if (getattr(args, "api_server_count", None) or 1) > 1:
        raise ServerError(
            "--api-server-count above 1 is not offered by pvq serve: use vLLM's own serve command"
        )
    try:
        _from_vllm("validate_parsed_serve_args")(args)
    except (TypeError, ValueError) as error:
        raise ServerError(
            f"the flags of vLLM cannot be used together ({_sentence(error)}): change them"
        ) from None
    return args


def check_architecture(model: str) -> None:
    """Raise ServerError if neither vLLM nor transformers knows the model type of the folder ``model``; pass a
    name on the hub.
    """
    config = read_config(model)
    if config is None:
        return
    import transformers
    import vllm
    from vllm.model_executor.models import ModelRegistry

    names = config.get("architectures") or []
    if (
        set(names) & set(ModelRegistry.get_supported_archs())
        or config["model_type"] in transformers.CONFIG_MAPPING
    ):
        return
    raise ServerError(
        f"{model}/config.json has the model type {config['model_type']!r} "
        f"({', '.join(names) or 'no architecture'}), which neither vLLM "
        f"{vllm.__version__} nor transformers {transformers.__version__} knows: give a model of "
        "another type or upgrade them"
    )


def set_cpu_defaults(settings: Settings) -> None:
    """On the CPU platform set the environment of vLLM that ``settings`` or this machine call for; variables
    already set win.

    VLLM_CPU_KVCACHE_SPACE: without it vLLM reserves nearly all memory; here a quarter of what is available,
    from 1 to 8 GiB.
    VLLM_CPU_OMP_THREADS_BIND: vLLM's own choice, one thread per core with one core left to the scheduler,
    unless set.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    available_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cache_gib = settings.cpu_kv_cache_gib or min(8, max(1, int(available_gib / 4)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
    if settings.cpu_threads_bind:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", settings.cpu_threads_bind)


def _sentence(error: BaseException) -> str:
    """Return what ``error`` says in one line of at most 300 characters."""
    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    text = " ".join(text.removeprefix("Value error, ").split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@contextlib.contextmanager
def _children_do_not_hear(number: signal.Signals) -> Iterator[None]:
    """Block a signal in the processes that multiprocessing starts meanwhile: they inherit the mask, and nobody lifts it."""
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_with_mask(*args: Any) -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        try:
            return spawn(*args)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})

    multiprocessing.util.spawnv_passfds = spawn_with_mask
    try:
        yield
    finally:
        multiprocessing.util.spawnv_passfds = spawn


@contextlib.asynccontextmanager
async def _engine(args: argparse.Namespace) -> AsyncIterator[Any]:
    """Start vLLM's engine; ServerError if it does not start."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            # A terminal sends Ctrl-C to all processes, and the engine's would drop the running requests.
            with _children_do_not_hear(signal.SIGINT):
                client = await stack.enter_async_context(_from_vllm("build_async_engine_client")(args))
        except (ValueError, OSError, NotImplementedError) as error:
            raise ServerError(
                f"vLLM refuses {args.model} ({_sentence(error)}): change the flags or the model"
            ) from error
        except RuntimeError as error:
            raise ServerError(
                f"the engine did not start with {args.model} ({_sentence(error)}): the first error "
                "above says why"
            ) from error
        yield client


def _take_over(args: argparse.Namespace, settings: Settings) -> KeyStore:
    """Return the keys, and take from vLLM's ``args`` what this server does itself: keys, CORS, and the bound on
    answers that vLLM applies where a request names none.
    """
    keys = (
        [settings.api_key.get_secret_value()]
        if settings.api_key
        else list(getattr(args, "api_key", None) or ())
    )
    from_environment = os.environ.pop(_VLLM_KEY, None)
    if not keys and from_environment:
        keys = [from_environment]
    args.api_key = None
    args.allowed_origins = []
    if settings.max_output_tokens:
        override = dict(getattr(args, "override_generation_config", None) or {})
        bound = min(settings.max_output_tokens, override.get("max_new_tokens", settings.max_output_tokens))
        args.override_generation_config = {**override, "max_new_tokens": bound}
    return KeyStore(keys, settings.api_key_file)


def _limits(client: Any, settings: Settings) -> Limits:
    """Return what may be admitted to the engine behind ``client``."""
    config = client.vllm_config
    can_run = config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
    return Limits(
        sequences=can_run + settings.max_waiting,
        body_bytes=settings.max_body_bytes,
        sequences_per_key=settings.max_inflight_per_key,
        requests_per_minute=settings.max_requests_per_minute_per_key,
        prompt_tokens=settings.max_prompt_tokens,
        output_tokens=settings.max_output_tokens,
    )


async def _watch_engine(client: Any, drain: Drain) -> None:
    """Return when the engine has died, after the end of the server has begun."""
    while not client.errored:
        await asyncio.sleep(_ENGINE_CHECK_INTERVAL_S)
    drain.fail(_FAILED_TIMEOUT_S)


async def _serve(
    args: argparse.Namespace,
    settings: Settings,
    keys: KeyStore,
    state: ServerState,
    loading: LoadingServer,
    listener: socket.socket,
) -> None:
    """Serve until a signal or the death of the engine; ``state`` says which."""
    loop = asyncio.get_running_loop()
    async with _engine(args) as client:
        tasks = await client.get_supported_tasks()
        app = _from_vllm("build_app")(args, tasks, client.model_config)
        add_routes(app)
        await _from_vllm("init_app_state")(client, app.state, args, tasks)
        add_state(app, settings, state)
        server = make_server(guard(app, state, settings, keys, _limits(client, settings)), settings)
        app.state.server = _Unstoppable()
        drain = Drain(server, state, settings.drain_timeout_s)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, drain.start)
        loop.add_signal_handler(signal.SIGHUP, keys.reload)
        watches = [loop.create_task(_watch_engine(client, drain)), loop.create_task(keys.watch())]
        loading.stop()
        state.enter(Phase.READY)
        logger.info("ready: %s on %s:%d", args.model, settings.host, settings.port)
        try:
            await server.serve(sockets=[listener.dup()])
        finally:
            for watch in watches:
                watch.cancel()
            if client.errored:
                state.enter(Phase.FAILED)
                exit_at_the_latest(_FAILED_TIMEOUT_S + _CLEAN_UP_TIMEOUT_S, 1)


class _Unstoppable:
    """Stands for the server in vLLM's error handlers, which would stop it at once when the engine dies; here
    ``Drain`` does that, after the clients have their answers.
    """

    should_exit = False


def _interrupt(number: int, _frame: object) -> None:
    """End the process while the model is loading, at once: asyncio's own handler would wait for the next await."""
    print("pvq: stopped while the model was loading", file=sys.stderr)
    raise SystemExit(128 + number)


def run(
    model: str,
    settings: Settings,
    flags: Sequence[str],
    listener: socket.socket,
    restarts: Sequence[float] = (),
) -> int:
    """Serve ``model`` on ``listener`` until SIGINT or SIGTERM and return the exit status: 0, or 1 if the
    engine died.

    With ``settings.on_engine_death`` "restart" it does not return after a death of the engine, but replaces the
    process, unless ``restarts`` has too many in too short a time.

    Args:
        model: a Hugging Face folder, or a name that vLLM can fetch.
        flags: flags of ``vllm serve``, passed on as they are.
        listener: bound, not yet listening or from the process image before; closed at the end.
        restarts: when (Unix time) the server was restarted before.
    Raises:
        ServerError: vLLM does not know the model or refuses the flags.
    """
    logs.configure(settings.log_format)
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the keys have not been read yet; it would end the process
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE,
        (most if most != resource.RLIM_INFINITY and most < _OPEN_FILES else _OPEN_FILES, most),
    )
    state = ServerState()
    with listener:
        loading = LoadingServer(settings, state, listener)
        loading.start()
        args = parse_arguments(model, settings, flags)
        handed_on = {name: os.environ[name] for name in (_VLLM_KEY,) if name in os.environ}
        keys = _take_over(args, settings)
        check_architecture(model)
        set_cpu_defaults(settings)
        for plugin, manager, method in (
            ("tool_parser_plugin", "ToolParserManager", "import_tool_parser"),
            ("reasoning_parser_plugin", "ReasoningParserManager", "import_reasoning_parser"),
        ):
            if getattr(args, plugin, None):
                getattr(_from_vllm(manager), method)(getattr(args, plugin))
        uvloop.run(_serve(args, settings, keys, state, loading, listener))
        if state.phase is not Phase.FAILED:
            return 0
        logger.error("the engine died")
        end_children()
        if settings.on_engine_death == "restart" and not state.told_to_end:
            if len(recent(restarts)) < settings.max_restarts:
                restart(listener, restarts, handed_on)
            logger.error("%d restarts within %g s: giving up", len(recent(restarts)), WINDOW_S)
        return 1
