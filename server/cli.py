# SPDX-License-Identifier: Apache-2.0
"""The command ``pvq serve``. Heavy imports are inside the function, after the cheap checks."""

from typing import Annotated

import typer

from server.errors import ServerError, one_sentence
from server.options import with_settings


@with_settings
def serve(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="Folder of the model; before the flags of vLLM.  [PVQ_MODEL]",
        ),
    ] = None,
    *,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print all settings and where each comes from, and exit.")
    ] = False,
    **flags: str | bool | None,
) -> None:
    """Serve MODEL with vLLM behind an OpenAI-compatible API.

    Every other flag is passed on to vLLM, for example --max-model-len 2048 --served-model-name demo.
    """
    from server import restart
    from server.listen import bind
    from server.model import check_folder, read_config
    from server.settings import load

    vllm_flags = list(context.args)
    if model is not None and model.startswith("-"):  # a flag of vLLM: the model is named elsewhere
        vllm_flags.insert(0, model)
        model = None
    with one_sentence():
        loaded = load(model=model, **flags)
        vllm_flags = [*loaded.vllm_flags, *vllm_flags]
        if show_config:
            print(loaded.show(vllm_flags))
            return
        model = loaded.settings.model
        if model is None:
            raise ServerError(
                "MODEL is missing: give the folder of a model, with config.json, weights and tokenizer"
            )
        config = read_config(model)
        listener, restarts = restart.inherited()
        if listener is None:
            listener = bind(loaded.settings.host, loaded.settings.port)
        if config is not None:
            check_folder(model, config)
        from server import engine

        status = engine.run(model, loaded.settings, vllm_flags, listener, restarts)
    raise typer.Exit(status)


serve.context_settings = {"allow_extra_args": True, "ignore_unknown_options": True}  # type: ignore[attr-defined]
