# SPDX-License-Identifier: Apache-2.0
"""The files in deploy/: they parse, agree with the server's settings and routes, and name metrics that it has.

test_server/data/metrics.txt was recorded from `pvq serve`.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from server.settings import load
from tests.test_server.page_backend import RECORDED

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")
OF_PROMETHEUS = {"up"}


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """Return the names of the labels of each recorded metric."""
    found: dict[str, set[str]] = {}
    for name, inside in re.findall(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ", RECORDED, flags=re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', inside))
    return found


@pytest.fixture
def load_toml(tmp_path):
    """Return a function: text of a configuration -> what the server makes of it, its key file put in tmp_path."""

    def make(text: str):
        keys = tmp_path / "api-keys"
        keys.write_text("name a-key\n")
        file = tmp_path / "serve.toml"
        file.write_text(re.sub(r'(api_key_file = )"[^"]*"', rf'\1"{keys}"', text))
        return load(config_file=str(file))

    return make


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict]:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    kinds = {document["kind"]: document for document in documents}
    assert len(kinds) == len(documents)
    return kinds


def check_query(query: str, labels: dict[str, set[str]]) -> None:
    """Fail if ``query`` has a metric or a label that was not recorded."""
    selectors = [selector for selector in SELECTOR.findall(query) if selector[0] not in OF_PROMETHEUS]
    assert selectors or query.startswith("up{"), query
    for name, inside in selectors:
        assert name in labels, f"{name} is no metric of the server"
        chosen = set(re.findall(r"(\w+)=?[~!]?=", inside)) | {
            label for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(", ")
        }
        assert chosen - {"instance", "job"} <= labels[name], (name, chosen)


def test_each_query_of_the_dashboard_asks_for_a_metric_of_the_server(labels):
    dashboard = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    assert len(dashboard["panels"]) >= 15
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            check_query(target["expr"], labels)
            assert 'instance=~"$instance"' in target["expr"]
    (variable,) = [v for v in dashboard["templating"]["list"] if v["name"] == "instance"]
    assert re.fullmatch(r"label_values\((\w+), instance\)", variable["definition"])[1] in labels


@pytest.mark.vllm
@pytest.mark.slow
def test_a_running_server_has_each_metric_that_is_asked_for(served):
    """The recording is not out of date."""
    assert served.get("/v1/models", "wrong")[0] == 401  # a reason appears in /metrics once it has occurred
    assert served.get("/v1/models", served.key)[0] == 200
    running = set(re.findall(r"^([\w:]+)", served.get("/metrics")[1], flags=re.MULTILINE))
    asked = {
        name
        for file in ("grafana.json", "alerts.yml")
        for name, _ in SELECTOR.findall((DEPLOY / file).read_text(encoding="utf-8"))
    } - OF_PROMETHEUS
    assert len(asked) > 15 and asked <= running


def test_the_panels_of_the_dashboard_do_not_overlap():
    panels = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))["panels"]
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_query_check_finds_what_the_server_does_not_have(labels):
    for query in ('rate(vllm:no_such_metric{instance="a"}[5m])', 'vllm:num_requests_running{colour="red"}'):
        with pytest.raises(AssertionError):
            check_query(query, labels)


def test_prometheus_scrapes_and_alerts(labels):
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    for file in config["rule_files"]:
        for group in yaml.safe_load((DEPLOY / file).read_text(encoding="utf-8"))["groups"]:
            for rule in group["rules"]:
                check_query(rule["expr"], labels)
                assert f'job="{job["job_name"]}"' in rule["expr"] and rule["annotations"]["summary"]


def test_probes_ask_routes_that_need_no_key(manifests, app_client):
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    client = app_client(["a key"])
    for probe, path in (("livenessProbe", "/health"), ("readinessProbe", "/ready")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
        assert client.get(path).status_code == 200
    (port,) = container["ports"]
    assert port == {"name": "http", "containerPort": 8000}
    assert manifests["Service"]["spec"]["ports"][0]["targetPort"] == "http"


def test_kubernetes_gives_the_server_its_settings_and_time_to_drain(manifests, load_toml):
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = load_toml(manifests["ConfigMap"]["data"]["serve.toml"]).settings
    assert settings.host == "0.0.0.0" and settings.port == container["ports"][0]["containerPort"]
    sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + settings.drain_timeout_s + 20
    assert container["readinessProbe"]["timeoutSeconds"] > settings.health_timeout_s
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert container["args"] == ["--config-file", f"{mounts['config']}/serve.toml"]
    assert f"{mounts['keys']}/api-keys" in manifests["ConfigMap"]["data"]["serve.toml"]
    assert settings.model == mounts["model"]
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        selector = manifests[kind]["spec"]["selector"]
        labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
        assert (selector.get("matchLabels") or selector) == labels


def test_systemd_gives_the_server_time_to_drain(load_toml):
    unit = (DEPLOY / "pvq.service").read_text(encoding="utf-8")
    settings = load_toml((DEPLOY / "serve.toml").read_text(encoding="utf-8")).settings
    assert "\nExecStart=/opt/pvq/bin/pvq serve --config-file /etc/pvq/serve.toml\n" in unit
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1]) >= settings.drain_timeout_s + 20
    # the first signal must reach the server alone, which then ends its engine
    assert "\nKillMode=mixed\n" in unit and "\nKillSignal" not in unit
    assert settings.on_engine_death == "exit" and "\nRestart=on-failure\n" in unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "pvq.service"
    text = (DEPLOY / "pvq.service").read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/pvq/bin/pvq", "/bin/true"))  # the program must exist
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    ours = [line for line in done.stderr.splitlines() if "pvq.service" in line]
    assert done.returncode == 0 and ours == [], done.stderr


def test_the_containerfile_copies_what_is_there_and_runs_as_a_user():
    text = re.sub(r"\\\n", " ", (DEPLOY / "Containerfile").read_text(encoding="utf-8"))
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources)
    first, *stages = re.split(r"^FROM (\S+)(?: AS (\S+))?\n", text, flags=re.M)
    bodies = {name or base: body for base, name, body in zip(*[iter(stages)] * 3, strict=True)}
    assert (
        set(bodies) == {"cpu-build", "cpu", "cuda-build", "cuda", "${DEVICE}"}
        and "\nARG DEVICE=cpu\n" in first
    )
    assert set(re.findall(r"COPY --from=(\S+)", text)) == {"cpu-build", "cuda-build"}
    for name in ("cpu", "cuda"):
        assert "useradd --system --uid 10001 " in bodies[name]
    last = bodies["${DEVICE}"]
    assert re.search(r"^USER 10001$", last, re.M) and "PVQ_HOST=0.0.0.0" in last
    script = json.loads(re.search(r"^HEALTHCHECK .* CMD (.*)$", last, re.M)[1])[-1]
    assert f"\nCOPY deploy/healthcheck.py {script}\n" in last
    assert last.endswith('\nENTRYPOINT ["pvq", "serve"]\nCMD ["/model"]\n')
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    needed = {"README.md", "deploy", "LICENSE", "csrc", "cmake", "server", "requirements", "pyproject.toml"}
    assert needed.isdisjoint(ignored) and {".git", ".venv", "build"} <= set(ignored)
