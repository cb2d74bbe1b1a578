# SPDX-License-Identifier: Apache-2.0
"""The console script: fast, lazy, one sentence for bad input."""

import json
import socket
import subprocess
import sys
import tomllib

import pytest

from pvq_vllm import cli

COMMANDS = ["bench", "eval", "inspect", "quantize", "serve"]


def test_all_commands_are_installed_and_have_a_line_of_help():
    entries = cli.commands()
    assert sorted(entries) == COMMANDS, "the project is not installed: run make setup"
    for name, entry in entries.items():
        line = cli.summary(entry)
        assert line.endswith(".") and len(line) < 100, (name, line)


def test_the_line_of_help_is_the_docstring_of_the_function():
    for entry in cli.commands().values():
        assert cli.summary(entry) == entry.load().__doc__.splitlines()[0]


def test_help_lists_commands_without_importing_anything_heavy():
    script = (
        "import sys; from pvq_vllm import cli; status = cli.main(['--help']);"
        "heavy = "
        "{'torch', 'vllm', 'transformers', 'fastapi', 'matplotlib', 'server', 'offline_quant'} & "
        "set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy or status else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS), done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_needs_neither_torch_nor_vllm(command):
    script = (
        f"import sys; from pvq_vllm import cli; status = cli.main(['{command}', '--help']);"
        "heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules); sys.exit(f'imported "
        "{heavy}' if heavy or status else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_server_does_not_import_the_quantizer_or_the_plugin():
    script = (
        "import sys, server.cli, server.app, server.settings, server.listen, server.model, "
        "server.bench.client;"
        "found = {'pvq_vllm', 'offline_quant', 'vllm', 'torch'} & set(sys.modules); "
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_command_is_a_usage_error(run_pvq):
    done = run_pvq("nosuch")
    assert done.returncode == 2 and "No such command 'nosuch'" in done.stderr


def test_serve_shows_its_settings_without_a_model(run_pvq):
    done = run_pvq("serve", "--show-config", "--port", "9005", "--max-model-len", "2048")
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["port"] == 9005
    assert '"--max-model-len", "2048"' in done.stdout.splitlines()[-1]


def test_serve_without_a_model_says_so(run_pvq):
    done = run_pvq("serve", "--max-model-len", "2048")
    assert done.returncode == 2 and done.stderr.startswith("pvq: MODEL is missing")


def test_serve_has_a_flag_for_every_setting(run_pvq):
    from server.settings import Settings

    text = run_pvq("serve", "--help").stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text or name in ("model", "access_log"), name
    assert "--access-log" in text and "--no-access-log" in text


def test_serve_names_a_missing_folder(run_pvq, tmp_path):
    done = run_pvq("serve", str(tmp_path / "nosuch"))
    assert done.returncode == 2
    assert done.stderr.startswith("pvq: MODEL") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["serve", "inspect"])
def test_an_unknown_format_version_is_refused(run_pvq, model_folder, tmp_path, command):
    config = json.loads((model_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "pvq", "format_version": 99}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_pvq(command, str(tmp_path))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pvq: ") and "config.json" in last and "format_version" in last and "99" in last


def test_serve_finds_a_busy_port_before_it_imports_vllm(model_folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        script = (
            "import sys; from pvq_vllm import cli; status = cli.main(['serve', "
            f"{str(model_folder)!r}, '--port', '{port}']);"
            "sys.exit(3 if {'vllm', 'torch'} & set(sys.modules) else status)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"port {port}" in done.stderr and "Traceback" not in done.stderr


def test_an_error_of_this_project_is_one_sentence(monkeypatch, capsys):
    from pvq_vllm.codec.errors import PVQError

    def fail(entry):
        raise PVQError("shard x is too short: copy it again")

    monkeypatch.setattr(cli, "load_command", fail)
    assert cli.main(["inspect", "x"]) == 2
    assert capsys.readouterr().err == "pvq: shard x is too short: copy it again\n"


@pytest.mark.vllm
def test_serve_refuses_flags_of_vllms_own_http_server(run_pvq, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    done = run_pvq("serve", str(tmp_path), "--allowed-origins", '["*"]')
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1].startswith("pvq: --allowed-origins")
        and "--cors-origins" in done.stderr
    )


@pytest.mark.vllm
def test_serve_names_a_model_type_that_nobody_knows(run_pvq, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "nosuch", "architectures": ["NoSuchModel"]})
    )
    done = run_pvq("serve", str(tmp_path))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pvq: ") and "'nosuch'" in last and "NoSuchModel" in last
