"""The manifests against the schemas that Kubernetes publishes, and against KubeRay's own where a folder has them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.test_manifests import DEPLOY, MANIFESTS, documents, pods
from tests.support.paths import CHECKOUT

KUBERNETES = "1.30"
# `ray-operator/config/crd/bases` of KubeRay's repository (Apache 2.0): megabytes, so not in this one.
CRDS = Path(os.environ.get("PROBELOG_CRDS", CHECKOUT.parent / "shared/kuberay"))


def core() -> Iterator[tuple[str, dict[str, Any]]]:
    """The documents of kinds that are Kubernetes' own, and the pods in those of KubeRay."""
    for file in MANIFESTS:
        for document in documents(file):
            group = document["apiVersion"].partition("/")[0]
            if "." not in group or (group.endswith(".k8s.io") and "kustomize" not in group):
                yield f"{file.stem}-{document['kind']}", document
    for name, template in pods().items():
        metadata = {"name": "pod", **template["metadata"]}
        yield f"pod-{name}", {"apiVersion": "v1", "kind": "Pod", **template, "metadata": metadata}


@pytest.mark.parametrize("document", [pytest.param(document, id=name) for name, document in core()])
def test_kubernetes_takes_it(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_what_kubernetes_does_not_know_is_refused() -> None:
    ((_, document), *_) = (item for item in core() if item[0].startswith("pod-"))
    wrong = copy.deepcopy(document)
    wrong["spec"]["containers"][0]["resources"]["request"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses fields it does not name, as the API server does where a client asks it to."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def crds() -> dict[str, Any]:
    files = sorted(CRDS.glob("ray.io_*.yaml"))
    found = [yaml.load(file.read_text(), yaml.CSafeLoader) for file in files]
    return {
        crd["spec"]["names"]["kind"]: next(
            version["schema"]["openAPIV3Schema"]
            for version in crd["spec"]["versions"]
            if version["name"] == "v1"
        )
        for crd in found
    }


def test_kuberay_takes_it() -> None:
    schemas = crds()
    if not schemas:
        pytest.skip(
            f"KubeRay's CRDs are not in {CRDS}: the manifests were NOT held against them (PROBELOG_CRDS)"
        )
    held = 0
    for file in sorted((DEPLOY / "kuberay").glob("*.yaml")):
        for document in documents(file):
            if document["apiVersion"] == "ray.io/v1":
                schema = strict(schemas[document["kind"]])
                schema["properties"]["metadata"] = {"type": "object"}
                jsonschema.validate(document, schema)
                held += 1
    assert held >= 3
