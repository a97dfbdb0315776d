"""The manifests against the schemas that Kubernetes publishes, and against those of the operators where a folder has them."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.test_manifests import MANIFESTS, documents, pods
from tests.support.paths import CHECKOUT

KUBERNETES = "1.30"
# Of KubeRay, the Prometheus operator and Cilium (docs/development.md): megabytes, so not in this repository.
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
    if isinstance(made.get("pattern"), str) and "(?i)" in made["pattern"]:
        made["pattern"] = "(?i)" + made["pattern"].replace(
            "(?i)", ""
        )  # Go has flags anywhere, Python in front
    return made


class _Loader(yaml.CSafeLoader):
    """Reads an ``=`` as the word that it is, which PyYAML refuses (``enum`` of the Prometheus operator's matchers)."""


_Loader.add_constructor("tag:yaml.org,2002:value", _Loader.construct_yaml_str)


def crds() -> dict[tuple[str, str], Any]:
    """The schemas of the folder's CRDs, by ``apiVersion`` and ``kind``."""
    schemas = {}
    for file in sorted(CRDS.glob("*.yaml")):
        spec = yaml.load(file.read_text(), _Loader)["spec"]
        for version in spec["versions"]:
            key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            schemas[key] = version["schema"]["openAPIV3Schema"]
    return schemas


def test_operators_take_it() -> None:
    schemas = crds()
    if not schemas:
        pytest.skip(f"no CRDs in {CRDS}: the manifests were NOT held against them (PROBELOG_CRDS)")
    held = Counter[str]()
    for file in MANIFESTS:
        for document in documents(file):
            published = schemas.get((document["apiVersion"], document["kind"]))
            if published is not None:
                schema = strict(published)
                schema["properties"]["metadata"] = {"type": "object"}
                jsonschema.validate(document, schema)
                held[document["apiVersion"].partition("/")[0]] += 1
    assert held["ray.io"] >= 3
    assert held.keys() >= {group.partition("/")[0] for group, _ in schemas}
