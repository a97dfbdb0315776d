"""The fields that the manifests use, as the CRDs and Kubernetes publish them (KubeRay 1.6 `ray.io/v1`, Kubernetes 1.30).

A small schema of our own: what is not written down here is refused, so that a misspelt field does not pass.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SWITCH: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "array", "items": TEXT}
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}


def record(needed: str = "", **fields: Schema) -> Schema:
    """An object of these fields and no other."""
    return {
        "type": "object",
        "properties": fields,
        "required": needed.split(),
        "additionalProperties": False,
    }


def many(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def choice(*values: str) -> Schema:
    return {"enum": list(values)}


METADATA = record(name=TEXT, generateName=TEXT, namespace=TEXT, labels=LABELS, annotations=LABELS)
SELECTOR = record(matchLabels=LABELS)

CONTAINER_SECURITY = record(
    "allowPrivilegeEscalation capabilities",
    allowPrivilegeEscalation={"const": False},
    readOnlyRootFilesystem={"const": True},
    capabilities=record("drop", drop={"const": ["ALL"]}),
)
POD_SECURITY = record(
    "runAsNonRoot seccompProfile",
    runAsNonRoot={"const": True},
    runAsUser=COUNT,
    fsGroup=COUNT,
    seccompProfile=record("type", type=choice("RuntimeDefault")),
)
AMOUNTS: Schema = {
    "type": "object",
    "properties": {
        "cpu": QUANTITY,
        "memory": QUANTITY,
        "ephemeral-storage": QUANTITY,
        "nvidia.com/gpu": TEXT,
    },
    "additionalProperties": False,
}
PROBE = record(
    "httpGet",
    httpGet=record("path port", path=TEXT, port=TEXT),
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
)
SECRET_KEY = record("name key", name=TEXT, key=TEXT)
CONTAINER = record(
    "name image securityContext resources",
    name=TEXT,
    image=TEXT,
    command=TEXTS,
    args=TEXTS,
    env=many(
        {
            "anyOf": [
                record("name value", name=TEXT, value=TEXT),
                record(
                    "name valueFrom", name=TEXT, valueFrom=record("secretKeyRef", secretKeyRef=SECRET_KEY)
                ),
            ]
        }
    ),
    envFrom=many(record("secretRef", secretRef=record("name", name=TEXT))),
    ports=many(record("containerPort", name=TEXT, containerPort=COUNT)),
    startupProbe=PROBE,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    resources=record("requests limits", requests=AMOUNTS, limits=AMOUNTS),
    securityContext=CONTAINER_SECURITY,
    volumeMounts=many(record("name mountPath", name=TEXT, mountPath=TEXT, readOnly=SWITCH)),
)
VOLUME = record(
    "name",
    name=TEXT,
    configMap=record("name", name=TEXT),
    emptyDir=record(medium=choice("Memory"), sizeLimit=QUANTITY),
)
AFFINITY = record(
    nodeAffinity=record(
        requiredDuringSchedulingIgnoredDuringExecution=record(
            nodeSelectorTerms=many(
                record(
                    matchExpressions=many(
                        record(
                            "key operator",
                            key=TEXT,
                            operator=choice("In", "NotIn", "Exists", "DoesNotExist"),
                            values=TEXTS,
                        )
                    )
                )
            )
        )
    )
)
TOLERATION = record(
    key=TEXT, operator=choice("Equal", "Exists"), value=TEXT, effect=choice("NoSchedule", "NoExecute")
)
POD = record(
    "metadata spec",
    metadata=METADATA,
    spec=record(
        "containers securityContext",
        containers=many(CONTAINER),
        volumes=many(VOLUME),
        securityContext=POD_SECURITY,
        affinity=AFFINITY,
        nodeSelector=LABELS,
        tolerations=many(TOLERATION),
        restartPolicy=choice("Never", "OnFailure"),
        serviceAccountName=TEXT,
        automountServiceAccountToken=SWITCH,
        terminationGracePeriodSeconds=COUNT,
    ),
)

RAY_CLUSTER = record(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=record("mode", mode=choice("token")),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=record(
        version=choice("v1", "v2"), idleTimeoutSeconds=COUNT, securityContext=CONTAINER_SECURITY
    ),
    headGroupSpec=record("template", rayStartParams=LABELS, template=POD, serviceType=TEXT),
    workerGroupSpecs=many(
        record(
            "groupName template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=LABELS,
            template=POD,
        )
    ),
)
RAY_JOB = record(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    submissionMode=choice("K8sJobMode", "HTTPMode"),
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=COUNT,
    runtimeEnvYAML=TEXT,
    suspend=SWITCH,
    rayClusterSpec=RAY_CLUSTER,
)
CRON: Schema = {"type": "string", "pattern": r"^(\S+ ){4}\S+$"}
CRON_JOB = record(
    "schedule jobTemplate",
    schedule=CRON,
    timeZone=TEXT,
    concurrencyPolicy=choice("Allow", "Forbid", "Replace"),
    startingDeadlineSeconds=COUNT,
    successfulJobsHistoryLimit=COUNT,
    failedJobsHistoryLimit=COUNT,
    suspend=SWITCH,
    jobTemplate=record(
        "spec",
        spec=record(
            "template",
            backoffLimit=COUNT,
            activeDeadlineSeconds=COUNT,
            podFailurePolicy=record(
                rules=many(
                    record(
                        action=choice("FailJob", "Ignore", "Count"),
                        onExitCodes=record(
                            "operator values",
                            containerName=TEXT,
                            operator=choice("In", "NotIn"),
                            values={"type": "array", "items": COUNT},
                        ),
                    )
                )
            ),
            template=POD,
        ),
    ),
)
DEPLOYMENT = record("selector template", replicas=COUNT, selector=SELECTOR, template=POD)
SERVICE = record(
    "selector ports", selector=LABELS, ports=many(record("port", name=TEXT, port=COUNT, targetPort=TEXT))
)
PORTS = many(record(protocol=choice("TCP", "UDP"), port=COUNT))
PEER = record(
    podSelector=SELECTOR,
    namespaceSelector=SELECTOR,
    ipBlock=record("cidr", cidr=TEXT, **{"except": TEXTS}),
)
NETWORK_POLICY = record(
    "podSelector policyTypes",
    podSelector=SELECTOR,
    policyTypes={"type": "array", "items": choice("Ingress", "Egress")},
    ingress=many(record(**{"from": many(PEER), "ports": PORTS})),
    egress=many(record(to=many(PEER), ports=PORTS)),
)
CILIUM = record(
    "endpointSelector",
    endpointSelector=SELECTOR,
    egress=many(
        record(
            toEndpoints=many(SELECTOR),
            toFQDNs=many(record(matchName=TEXT, matchPattern=TEXT)),
            toPorts=many(
                record(
                    ports=many(record("port", port=TEXT, protocol=choice("TCP", "UDP", "ANY"))),
                    rules=record(dns=many(record(matchPattern=TEXT))),
                )
            ),
        )
    ),
)
POD_MONITOR = record(
    "selector podMetricsEndpoints",
    selector=SELECTOR,
    podMetricsEndpoints=many(record("port", port=TEXT, interval=TEXT)),
)
RULES = record(
    "groups",
    groups=many(
        record(
            "name rules",
            name=TEXT,
            rules=many(
                record(
                    "alert expr labels annotations",
                    alert=TEXT,
                    expr=TEXT,
                    labels=LABELS,
                    annotations=LABELS,
                    **{"for": TEXT},
                )
            ),
        )
    ),
)

# (apiVersion, kind) -> what its `spec` (or the object itself, under "") looks like.
KINDS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayCluster"): record("spec", spec=RAY_CLUSTER),
    ("ray.io/v1", "RayJob"): record("spec", spec=RAY_JOB),
    ("ray.io/v1", "RayCronJob"): record(
        "spec",
        spec=record("schedule jobTemplate", schedule=CRON, suspend=SWITCH, jobTemplate=RAY_JOB),
    ),
    ("batch/v1", "CronJob"): record("spec", spec=CRON_JOB),
    ("apps/v1", "Deployment"): record("spec", spec=DEPLOYMENT),
    ("v1", "Service"): record("spec", spec=SERVICE),
    ("networking.k8s.io/v1", "NetworkPolicy"): record("spec", spec=NETWORK_POLICY),
    ("cilium.io/v2", "CiliumNetworkPolicy"): record("spec", spec=CILIUM),
    ("monitoring.coreos.com/v1", "PodMonitor"): record("spec", spec=POD_MONITOR),
    ("monitoring.coreos.com/v1", "PrometheusRule"): record("spec", spec=RULES),
    ("v1", "Namespace"): record(),
    ("v1", "ServiceAccount"): record(automountServiceAccountToken=SWITCH),
    ("v1", "Secret"): record("type stringData", type=TEXT, stringData=LABELS),
    ("kustomize.config.k8s.io/v1beta1", "Kustomization"): record(
        namespace=TEXT,
        resources=TEXTS,
        configMapGenerator=many(record("name files", name=TEXT, files=TEXTS)),
        generatorOptions=record(disableNameSuffixHash=SWITCH),
    ),
}


def schema_of(document: dict[str, Any]) -> Schema:
    """The schema of one manifest, by its kind."""
    own = KINDS[document["apiVersion"], document["kind"]]
    head = {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA}
    return {**own, "properties": {**head, **own["properties"]}}
