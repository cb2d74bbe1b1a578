# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server around vLLM, and a load test for it. Knows nothing of how a checkpoint is
quantized.

cli.py       the command ``pvq serve``; options.py makes its flags from the settings
settings.py  what can be set, by flag, environment (PVQ_*) or TOML file
model.py     checks of the model folder before anything heavy is imported
listen.py    the listening socket, taken before the model is loaded
engine.py    the only importer of vLLM: arguments, engine, app, life cycle
restart.py   a fresh process after a death of the engine
http.py      the HTTP server around the app: uvicorn, the middleware below, draining
app.py       adds this project's routes (routes/) to the app that vLLM builds
bench/       the load test ``pvq bench``

A request passes, from the outside: connection.py (slow clients), access.py (id, log line, metrics), gate.py (503 while
not ready), auth.py with keys.py, admission.py with body.py, prompts.py (what the engine can carry) and unusable.py (what vLLM
would break on), disconnect.py (clients that leave), vLLM's app.
state.py says what the server is doing, metrics.py counts, logs.py writes, asgi.py has what the middleware share.
"""
