"""deploy/kubernetes: its objects fit the API servers' schemas and each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from earmark.core import broker
from earmark.core.settings import Broker

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
OBJECTS: dict[str, Any] = {
    f"{one['kind']}/{one['metadata']['name']}": one
    for file in KUSTOMIZATION["resources"]
    for one in yaml.safe_load_all((FOLDER / file).read_text())
}
PODS = {
    name: one["spec"]["template"]["spec"]
    for name, one in OBJECTS.items()
    if one["kind"] in ("Deployment", "Job")
}


@pytest.mark.parametrize(
    "name", [name for name, one in OBJECTS.items() if "keda" not in one["apiVersion"]]
)
def test_each_object_is_valid_for_kubernetes(name: str) -> None:
    for version in ("1.31", "1.36"):
        kubernetes_validate.validate(OBJECTS[name], version, strict=True)


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_least_privileges_and_its_secrets_in_a_file(name: str) -> None:
    pod = PODS[name]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["secrets"] == "/run/secrets"
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)


def test_a_worker_has_time_to_drain_and_a_readiness_probe() -> None:
    pod = PODS["Deployment/worker"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] == 60
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "metrics"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/health", "port": "metrics"}
    dockerfile = (FOLDER.parents[1] / "Dockerfile").read_text()
    assert f"METRICS_PORT={container['ports'][0]['containerPort']}" in dockerfile


def test_every_referenced_object_exists() -> None:
    made = {secret["name"] for secret in KUSTOMIZATION["secretGenerator"]}
    asked = set(
        re.findall(
            r"secretName: ([\w-]+)", "".join(file.read_text() for file in FOLDER.glob("*.yaml"))
        )
    )
    scaled, login = (
        OBJECTS["ScaledObject/worker"]["spec"],
        OBJECTS["TriggerAuthentication/redis"]["spec"],
    )
    asked |= {reference["name"] for reference in login["secretTargetRef"]}
    assert asked == made
    assert f"Deployment/{scaled['scaleTargetRef']['name']}" in OBJECTS
    assert f"TriggerAuthentication/{scaled['triggers'][0]['authenticationRef']['name']}" in OBJECTS
    for name, labels in (("worker", "PodDisruptionBudget/worker"), ("flower", "Service/flower")):
        selector = OBJECTS[labels]["spec"]["selector"]
        labelled = OBJECTS[f"Deployment/{name}"]["spec"]["template"]["metadata"]["labels"]
        assert selector.get("matchLabels", selector).items() <= labelled.items()


def test_workers_scale_with_the_queue_down_to_one() -> None:
    scaled = OBJECTS["ScaledObject/worker"]["spec"]
    assert scaled["triggers"][0]["metadata"]["listName"] == f"{broker.KEY_PREFIX}clips"
    assert "EARMARK_BROKER__QUEUE=clips" in (FOLDER / "kustomization.yaml").read_text()
    assert scaled["minReplicaCount"] >= 1
    # A full queue asks for more workers than those that can fill it.
    asked = Broker().high_water / int(scaled["triggers"][0]["metadata"]["listLength"])
    assert asked > 1


def test_the_gpu_patch_applies_to_existing_objects() -> None:
    overlay = yaml.safe_load((FOLDER / "gpu/kustomization.yaml").read_text())
    assert overlay["images"][0]["name"] == KUSTOMIZATION["images"][0]["newName"]
    for change in yaml.safe_load(overlay["patches"][0]["patch"]):
        there: Any = OBJECTS["Deployment/worker"]
        for part in change["path"].split("/")[1 : None if change["op"] == "replace" else -1]:
            there = there[int(part) if part.isdigit() else part]
