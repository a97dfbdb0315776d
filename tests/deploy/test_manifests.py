"""What an operator deploys: the manifests are what Kubernetes accepts, and name what exists."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml

import probelog.cli
from cluster.runtime.node import NODE_RESOURCE_VARIABLE
from pipelines.cli import app
from pipelines.config.model import Config, load_config
from pipelines.probe.metrics import COUNTERS, GAUGES
from probelog.errors import FailureReason
from tests.deploy.kubernetes_schema import schema_of
from tests.support.paths import CHECKOUT

DEPLOY = CHECKOUT / "deploy"
PAGE = CHECKOUT / "docs/operators/cluster.md"
PAGES = sorted((CHECKOUT / "docs/operators").glob("*.md"))
MANIFESTS = sorted([*(DEPLOY / "kuberay").glob("*.yaml"), DEPLOY / "web/page.yaml"])


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def ray_jobs() -> dict[str, Any]:
    full = documents(DEPLOY / "kuberay/full.yaml")[0]["spec"]
    nightly = documents(DEPLOY / "kuberay/nightly-raycronjob.yaml")[0]["spec"]["jobTemplate"]
    return {"full": full, "nightly": nightly}


def shared_cluster() -> dict[str, Any]:
    return dict(documents(DEPLOY / "kuberay/shared-cluster.yaml")[0]["spec"])


def shared_job() -> dict[str, Any]:
    return dict(documents(DEPLOY / "kuberay/nightly-shared.yaml")[0]["spec"]["jobTemplate"]["spec"])


def submission() -> tuple[dict[str, str], list[str]]:
    """What `ray job submit` is told for a shared cluster, and the command that it runs there."""
    (container,) = shared_job()["template"]["spec"]["containers"]
    command = container["command"]
    assert command[:3] == ["ray", "job", "submit"]
    end = command.index("--")
    return dict(word.removeprefix("--").split("=", 1) for word in command[3:end]), command[end + 1 :]


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_a_manifest_is_what_its_kind_allows(file: Path) -> None:
    for document in documents(file):
        jsonschema.validate(document, schema_of(document))


def test_the_schema_refuses_a_misspelt_field() -> None:
    document = documents(DEPLOY / "kuberay/full.yaml")[0]
    document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(document, schema_of(document))


def test_both_ray_jobs_run_the_same_cluster_but_for_its_size() -> None:
    full, nightly = (copy.deepcopy(job["rayClusterSpec"]) for job in ray_jobs().values())
    for cluster in (full, nightly):
        del cluster["workerGroupSpecs"][0]["maxReplicas"]
    assert full == nightly


def test_spot_workers_have_time_to_hand_back() -> None:
    config = Config.model_validate(tomllib.loads((DEPLOY / "kuberay/job.toml").read_text()))
    for job in ray_jobs().values():
        cluster = job["rayClusterSpec"]
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        head = cluster["headGroupSpec"]["template"]["spec"]
        assert "nodeSelector" not in head
        (group,) = cluster["workerGroupSpecs"]
        pod = group["template"]["spec"]
        (worker,) = pod["containers"]
        ray_drains = next(item for item in worker["env"] if "DRAIN" in item["name"])["value"]
        assert config.drain_seconds < float(ray_drains) < pod["terminationGracePeriodSeconds"]
        assert pod["automountServiceAccountToken"] is False
        mounts = {mount["name"]: mount["mountPath"] for mount in worker["volumeMounts"]}
        assert mounts["scratch"] == str(config.scratch)
        assert {"secretRef": {"name": "probelog-secrets"}} in worker["envFrom"]


def test_actors_fit_their_machines() -> None:
    config = Config.model_validate(tomllib.loads((DEPLOY / "kuberay/job.toml").read_text()))
    (group,) = ray_jobs()["full"]["rayClusterSpec"]["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    actors = min(
        float(resources["requests"]["cpu"]) / config.cpus_per_worker,
        float(resources["limits"]["nvidia.com/gpu"]) / config.gpus_per_worker,
    )
    assert config.workers == actors * group["maxReplicas"]


def commands() -> list[list[str]]:
    """Every operator's command line in the manifests and in the operators' pages."""
    found = [shlex.split(job["entrypoint"]) for job in ray_jobs().values()]
    cron = documents(DEPLOY / "kuberay/nightly-cronjob.yaml")[0]["spec"]["jobTemplate"]["spec"]["template"]
    found += [container["command"] for container in cron["spec"]["containers"]]
    found.append(submission()[1])
    for page in PAGES:
        for line in "".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)).splitlines():
            words = shlex.split(line, comments=True)
            for start in ("probelog-index", "pipelines"):
                if start in words:
                    found.append(words[words.index(start) :])
    return found


def test_every_command_exists_with_its_options() -> None:
    assert len(commands()) >= 20
    for words in commands():
        command: Any = typer.main.get_command(app)
        arguments = words[1:]
        while arguments and hasattr(command, "commands") and arguments[0] in command.commands:
            command, arguments = command.commands[arguments[0]], arguments[1:]
        if hasattr(command, "commands"):
            assert set(arguments) <= {"--help", ">", "job.toml"}, words
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in arguments if word.startswith("--")} <= options, words


def test_files_that_the_page_names_are_there() -> None:
    text = PAGE.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (PAGE.parent / target).exists(), target
    for path in re.findall(r"deploy/[\w./-]+\w", text):
        assert (CHECKOUT / path).exists(), path


def test_alarms_ask_for_metrics_that_exist_and_the_page_says_what_to_do() -> None:
    groups = documents(DEPLOY / "kuberay/monitoring.yaml")[1]["spec"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    exported = {f"ray_{name}" for name in (*COUNTERS, *GAUGES)}
    reasons = {reason.value for reason in FailureReason} | {"indexed", "copy"}
    page = PAGE.with_name("monitoring.md").read_text()
    for rule in rules:
        assert set(re.findall(r"ray_\w+", rule["expr"])) <= exported
        for value in re.findall(r'result!?=~?"([^"]+)"', rule["expr"]):
            assert set(value.split("|")) <= reasons
        assert f"| `{rule['alert']}` |" in page


def test_prometheus_finds_the_exporter() -> None:
    monitor, _ = documents(DEPLOY / "kuberay/monitoring.yaml")
    pod = pods()["exporter"]
    assert matches(monitor["spec"]["selector"], pod["metadata"]["labels"])
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    assert port["name"] == monitor["spec"]["podMetricsEndpoints"][0]["port"]
    assert str(port["containerPort"]) in container["command"]


def test_the_configuration_is_one(tmp_path: Path) -> None:
    assert load_config(DEPLOY / "kuberay/job.toml").store.startswith("s3://")
    generated = documents(DEPLOY / "kuberay/kustomization.yaml")[0]
    for name in [*generated["resources"], *generated["configMapGenerator"][0]["files"]]:
        assert (DEPLOY / "kuberay" / name).is_file()


def test_no_secret_is_written_down() -> None:
    (secret,) = documents(DEPLOY / "kuberay/secret.example.yaml")
    assert not any(secret["stringData"].values())
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert not re.search(r"(?i)(ENV|ARG)\s+\S*(token|secret|key)", dockerfile)
    assert re.search(r"(?m)^USER probelog$", dockerfile)


def pods() -> dict[str, dict[str, Any]]:
    """The pods that the manifests describe, by what they are."""
    cron = documents(DEPLOY / "kuberay/nightly-cronjob.yaml")[0]["spec"]["jobTemplate"]["spec"]["template"]
    exporter = documents(DEPLOY / "kuberay/exporter.yaml")[0]["spec"]["template"]
    made = {"cron": cron, "exporter": exporter}
    made["submit"] = shared_job()["template"]
    for group in shared_cluster()["workerGroupSpecs"]:
        made[f"shared-{group['groupName']}"] = group["template"]
    for name, job in ray_jobs().items():
        cluster = job["rayClusterSpec"]
        made[f"{name}-head"] = cluster["headGroupSpec"]["template"]
        made[f"{name}-worker"] = cluster["workerGroupSpecs"][0]["template"]
    return made


@pytest.mark.parametrize("name", sorted(pods()))
def test_a_pod_has_no_more_rights_than_it_needs(name: str) -> None:
    """What `restricted` asks for, and a root file system that cannot be written. KubeRay copies the container's context to
    the one that waits for the head.
    """
    spec = pods()[name]["spec"]
    check_rights(spec)
    # The head's account is the autoscaler's, of KubeRay's making: no untrusted model is there.
    assert spec.get("automountServiceAccountToken") is (None if name.endswith("head") else False)
    # What is written goes to volumes with a bound, or to the node's disk that the pod has to itself.
    assert writable(spec) == ({"/tmp"} if name == "exporter" else {"/tmp", "/scratch", "/dev/shm"})


def writable(spec: dict[str, Any]) -> set[str]:
    (container,) = spec["containers"]
    return {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}


def check_rights(spec: dict[str, Any]) -> None:
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace"} & spec.keys()
    assert not any("hostPath" in volume for volume in spec["volumes"])
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"name": "HOME", "value": "/tmp"} in container["env"]


def page_documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in documents(DEPLOY / "web/page.yaml")}


def test_the_pages_pod_can_read_and_nothing_else() -> None:
    pod = page_documents()["Deployment"]["spec"]["template"]["spec"]
    check_rights(pod)
    assert pod["automountServiceAccountToken"] is False
    assert page_documents()["ServiceAccount"]["automountServiceAccountToken"] is False
    assert writable(pod) == {"/tmp"}
    (container,) = pod["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "probelog-read"}}]
    (policy,) = (document for kind, document in page_documents().items() if kind == "NetworkPolicy")
    assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} == {8017}


def test_the_pages_parts_fit_each_other() -> None:
    found = page_documents()
    template = found["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    for selector in (
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector == labels
    # The crawl's policy, whose pods hold tokens, is not for it.
    assert not matches({"matchLabels": {"app.kubernetes.io/name": "probelog"}}, labels)
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    command = container["command"]
    assert command[:2] == ["probelog", "web"]
    assert command[command.index("--port") + 1] == str(port["containerPort"])
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    parameters: Any = typer.main.get_command(probelog.cli.app).commands["web"].params  # type: ignore[attr-defined]
    options = {option for parameter in parameters for option in parameter.opts}
    assert {word for word in command if word.startswith("--")} <= options
    variables = {parameter.envvar for parameter in parameters if parameter.envvar}
    assert variables <= {item["name"] for item in container["env"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": port["name"]}


def test_ray_asks_for_a_token_on_every_node() -> None:
    (version,) = re.findall(r"^ray==([\d.]+)", (CHECKOUT / "requirements.txt").read_text(), re.MULTILINE)
    for job in ray_jobs().values():
        assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
        # KubeRay refuses the option without a version that has it.
        assert job["rayClusterSpec"]["rayVersion"] == version
    manifests = "".join(file.read_text() for file in MANIFESTS)
    assert manifests.count("RAY_AUTH_MODE") == 1, "in nightly-shared.yaml, whose pod is not KubeRay's"
    launcher = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    assert launcher["file_mounts"] == {"/home/probelog/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]


def test_the_job_on_a_shared_cluster_fits_its_nodes() -> None:
    from ray.dashboard.modules.job.cli import submit

    options, command = submission()
    assert {f"--{name}" for name in options} <= {word for item in submit.params for word in item.opts}
    name = documents(DEPLOY / "kuberay/shared-cluster.yaml")[0]["metadata"]["name"]
    assert options["address"] == f"http://{name}-head-svc:8265"
    (container,) = shared_job()["template"]["spec"]["containers"]
    token = next(item for item in container["env"] if item["name"] == "RAY_AUTH_TOKEN")
    assert token["valueFrom"]["secretKeyRef"]["name"] == name
    policy = documents(DEPLOY / "kuberay/nightly-shared.yaml")[1]["spec"]
    peers = [*policy["ingress"][0]["from"], *policy["egress"][0]["to"]]
    assert all(peer["podSelector"]["matchLabels"] == {"ray.io/cluster": name} for peer in peers)

    driver, workers = shared_cluster()["workerGroupSpecs"]
    offered = [json.loads(json.loads(group["rayStartParams"]["resources"])) for group in (driver, workers)]
    assert json.loads(options["entrypoint-resources"]) == offered[0]
    (pod,) = driver["template"]["spec"]["containers"]
    assert {item["name"]: item["value"] for item in pod["env"]}[NODE_RESOURCE_VARIABLE] in offered[1]
    assert driver["rayStartParams"]["num-cpus"] == "0", "no model beside the driver"
    config = load_config(DEPLOY / "kuberay/job.toml")
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    actors = float(resources["limits"]["nvidia.com/gpu"]) / config.gpus_per_worker
    assert f"workers={actors * workers['maxReplicas']:.0f}" in command
    assert (
        workers["template"]["spec"]
        == ray_jobs()["full"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    )


def matches(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    return selector is not None and selector.get("matchLabels", {}).items() <= labels.items()


def may_enter(namespace: str, pod: dict[str, str], port: int) -> bool:
    """Whether the policies let a pod reach one of ProbeLog's, as Kubernetes evaluates them."""
    ours = {"app.kubernetes.io/name": "probelog"}
    for policy in documents(DEPLOY / "kuberay/network-policy.yaml"):
        if "Ingress" not in policy["spec"]["policyTypes"] or not matches(policy["spec"]["podSelector"], ours):
            continue
        for rule in policy["spec"]["ingress"]:
            if "ports" in rule and port not in {item["port"] for item in rule["ports"]}:
                continue
            for peer in rule["from"]:
                there = {"kubernetes.io/metadata.name": namespace}
                inside = (
                    matches(peer["namespaceSelector"], there)
                    if "namespaceSelector" in peer
                    else namespace == "probelog"
                )
                if inside and ("podSelector" not in peer or matches(peer["podSelector"], pod)):
                    return True
    return False


@pytest.mark.parametrize(
    ("namespace", "pod", "port", "allowed"),
    [
        ("probelog", {"app.kubernetes.io/name": "probelog"}, 6379, True),
        ("probelog", {"app.kubernetes.io/name": "other"}, 8265, False),
        ("kuberay-operator", {"app.kubernetes.io/component": "kuberay-operator"}, 8265, True),
        ("kuberay-operator", {"app.kubernetes.io/component": "kuberay-operator"}, 6379, False),
        ("kuberay-operator", {}, 8265, False),
        ("default", {}, 8265, False),
        ("evil", {"app.kubernetes.io/component": "kuberay-operator"}, 8265, False),
        ("evil", {"app.kubernetes.io/name": "probelog"}, 8265, False),
        ("monitoring", {}, 8080, True),
        ("monitoring", {}, 8265, False),
    ],
)
def test_who_reaches_a_pod(namespace: str, pod: dict[str, str], port: int, allowed: bool) -> None:
    """The job interface runs what it is sent, in pods that hold secrets: for KubeRay's operator alone."""
    assert may_enter(namespace, pod, port) is allowed


def test_the_launcher_file_is_what_ray_accepts() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in config["available_node_types"]["head"]["node_config"]
