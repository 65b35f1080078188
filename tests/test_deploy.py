"""The files of deploy/ against the program they run: they parse, name options, paths and meters that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from prometheus_client import generate_latest

from gemwright.cli import serve
from gemwright.engine.request import Stats
from gemwright.serve.metrics import Meters
from gemwright.serve.settings import Settings

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
MANIFESTS = [DEPLOY / "kubernetes" / "gemwright.yaml", DEPLOY / "gke" / "gemwright.yaml"]
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"]


def documents(path: Path) -> dict[str, Any]:
    """By kind."""
    return {one["kind"]: one for one in yaml.safe_load_all(path.read_text())}


def options(arguments: list[str]) -> serve.Options:
    """The command line as the program reads it; SystemExit for what it does not know."""
    return tyro.cli(serve.Options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))


def meter_names() -> set[str]:
    meters = Meters()
    meters.watch(Stats)
    text = generate_latest(meters.registry).decode()
    families = re.findall(r"^# TYPE (\S+) (\S+)", text, re.M)
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
    shown = [(name, kind) for name, kind in families if not name.endswith("_created")]  # the client library's own
    return {name + suffix for name, kind in shown for suffix in suffixes[kind]}


@pytest.mark.parametrize("path", MANIFESTS, ids=["kubernetes", "gke"])
def test_a_deployment_drains_probes_and_limits(path: Path) -> None:
    found = documents(path)
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    asked = options(container["args"])
    assert asked.host == "0.0.0.0" and asked.port == container["ports"][0]["containerPort"]
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + asked.drain_seconds
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts[str(asked.model)]["readOnly"]
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels == found["Deployment"]["spec"]["selector"]["matchLabels"]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    gpu = container["resources"]["limits"].get("nvidia.com/gpu")
    assert (gpu == "1" and asked.loading.device == "cuda") or (gpu is None and asked.loading.device == "auto")


@pytest.mark.parametrize("path", MANIFESTS, ids=["kubernetes", "gke"])
def test_replicas_follow_the_queue(path: Path) -> None:
    spec = documents(path)["HorizontalPodAutoscaler"]["spec"]
    assert spec["scaleTargetRef"]["name"] == documents(path)["Deployment"]["metadata"]["name"]
    name = spec["metrics"][0]["pods"]["metric"]["name"].removeprefix("prometheus.googleapis.com|").partition("|")[0]
    assert name in meter_names()


@pytest.mark.parametrize("path", DOCKERFILES, ids=["cpu", "cuda"])
def test_an_image_runs_the_server_as_nobody_special(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    last = max(n for n, words in enumerate(lines) if words[0] == "FROM")
    assert ["USER", "10001"] in lines[last:]
    final = {words[0]: json.loads(" ".join(words[1:])) for words in lines if words[0] in ("ENTRYPOINT", "CMD")}
    program, verb = final["ENTRYPOINT"]
    assert (program, verb) == ("gemwright", "serve")
    asked = options(final["CMD"])
    assert ["EXPOSE", str(asked.port)] in lines and f":{asked.port}/ready" in text
    copied = [word for words in lines if words[0] == "COPY" and "--from=build" not in words for word in words[1:-1]]
    assert all((DEPLOY.parent / name).exists() for name in copied), copied
    assert not any("safetensors" in name or "model" in name for name in copied)  # weights are mounted


def test_compose_and_its_neighbours_fit_together() -> None:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    ours = found["gemwright"]
    assert (DEPLOY.parent / ours["build"]["dockerfile"]).is_file()
    assert float(ours["stop_grace_period"].removesuffix("s")) > Settings().drain_seconds
    assert all(port.startswith("127.0.0.1:") for service in found.values() for port in service.get("ports", ()))
    for service in found.values():
        for volume in service.get("volumes", ()):
            assert volume.startswith("$") or (DEPLOY / volume.partition(":")[0]).is_file(), volume
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == ["gemwright:8000"]


def test_every_meter_of_the_dashboard_exists_and_none_is_left_out() -> None:
    board = json.loads((DEPLOY / "grafana" / "gemwright.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"gemwright_\w+", " ".join(queries)))
    assert shown <= meter_names(), shown - meter_names()
    families = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in meter_names()}
    seen = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown}
    assert families - seen == {"gemwright_steps", "gemwright_request_seconds"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    source = yaml.safe_load((DEPLOY / "grafana" / "source.yaml").read_text())["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
