# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server around vLLM, and a load test for it. Knows nothing of how a checkpoint is
quantized.

cli.py       the commands ``pvq serve`` and ``pvq bench``
settings.py  what can be set, by flag or by environment (PVQ_*)
model.py     checks of the model folder before anything heavy is imported
listen.py    the listening socket, taken before the model is loaded
engine.py    the only importer of vLLM: arguments, engine, app, life cycle
app.py       adds this project's routes (routes/) to the app that vLLM builds
bench/       drives vLLM's benchmark client and draws its results
"""
