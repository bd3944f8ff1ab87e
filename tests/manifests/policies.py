"""What the manifests promise, as rules over rendered objects. A rule yields sentences, each a breach; none is good.

Each rule is proven by a case of broken.yaml that it must find.
"""

import re

from rendered import at, matches, name, of_kind, settings, workloads

# What the manifests name and somebody else makes; deploy/README.md says so.
CLAIMS_OF_OTHERS = {"conclave-models"}
# Beyond drain_seconds: what is cut off gets 4 s, and a signal takes a moment.
GRACE_MARGIN_SECONDS = 10


def hardened(objects, _):
    """Pod Security's `restricted`, and beyond it a root that can't be written."""
    for work in workloads(objects):
        context = work.pod.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser", 0) > 0:
            yield f"{work.name} may run as root"
        if at(context, "seccompProfile", "type") != "RuntimeDefault":
            yield f"{work.name} has no seccomp profile"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if work.pod.get(key):
                yield f"{work.name} has {key}"
        for volume in work.pod.get("volumes", []):
            if "hostPath" in volume:
                yield f"{work.name} mounts a path of its host"
        for one in work.containers + work.pod.get("initContainers", []):
            context = one.get("securityContext", {})
            if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
                yield f"{work.name} may gain privileges"
            if at(context, "capabilities", "drop") != ["ALL"] or at(context, "capabilities", "add"):
                yield f"{work.name} keeps capabilities"
            if context.get("readOnlyRootFilesystem") is not True:
                yield f"{work.name} can write its root"
            if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
                yield f"{work.name} may run as root"


def accounts(objects, _):
    """Nobody holds a token of the API server."""
    known = {made["metadata"]["name"]: made for made in of_kind(objects, "ServiceAccount")}
    for work in workloads(objects):
        account = known.get(work.pod.get("serviceAccountName"))
        if account is None:
            yield f"{work.name} has no service account of its own"
        elif account.get("automountServiceAccountToken") is not False:
            yield f"{name(account)} mounts its token"
        if work.pod.get("automountServiceAccountToken") is not False:
            yield f"{work.name} mounts its token"


def probes(objects, _):
    """Three on every container; and only /livez, which is about the process itself, may end one."""
    for work in workloads(objects):
        for one in work.containers:
            ports = {port.get("name") for port in one.get("ports", [])}
            for kind, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
                probe = at(one, kind, "httpGet")
                if probe is None:
                    yield f"{work.name} has no {kind}"
                elif probe["path"] != path:
                    yield f"{work.name}: {kind} asks {probe['path']}, not {path}"
                elif probe["port"] not in ports:
                    yield f"{work.name}: {kind} asks port {probe['port']}, which is not declared"


def images(objects, _):
    for work in workloads(objects):
        for one in work.containers + work.pod.get("initContainers", []):
            tag = one["image"].rsplit("/", 1)[-1].partition(":")[2]
            if not tag or tag == "latest":
                yield f"{work.name}: image {one['image']} is whatever was pushed last"


def resources(objects, _):
    """Requests for all, memory bounded; memory volumes sized, and within the container's own bound."""
    for work in workloads(objects):
        for one in work.containers:
            asked, bound = at(one, "resources", "requests", default={}), at(one, "resources", "limits", default={})
            if not {"cpu", "memory"} <= set(asked) or "memory" not in bound:
                yield f"{work.name}: cpu and memory must be requested, memory limited"
                continue
            mounts = {mount["name"]: mount["mountPath"] for mount in one.get("volumeMounts", [])}
            shared = [v for v in work.pod.get("volumes", []) if at(v, "emptyDir", "medium") == "Memory"]
            for volume in shared:
                size = at(volume, "emptyDir", "sizeLimit")
                if size is None:
                    yield f"{work.name}: volume {volume['name']} in memory has no size"
                elif quantity(size) >= quantity(bound["memory"]):
                    yield f"{work.name}: volume {volume['name']} has {size}, all the memory is {bound['memory']}"
            if "nvidia.com/gpu" in bound and "/dev/shm" not in [mounts.get(v["name"]) for v in shared]:
                yield f"{work.name} has GPUs and no memory at /dev/shm"


def quantity(text):
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
    factors = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * factors[unit]


def grace(objects, _):
    """Kubernetes kills later than the program ends by itself."""
    for work in workloads(objects):
        config = settings(objects, work)
        if config is None:
            continue
        drain = config.get("drain_seconds")
        if drain is None:
            yield f"{work.name}: its settings leave drain_seconds to a default"
            continue
        before = max(at(one, "lifecycle", "preStop", "sleep", "seconds", default=0) for one in work.containers)
        given, needed = work.pod.get("terminationGracePeriodSeconds", 30), before + drain + GRACE_MARGIN_SECONDS
        if given < needed:
            yield f"{work.name} is killed after {given} s, it needs {before} + {drain} + {GRACE_MARGIN_SECONDS}"


def listener(objects, _):
    """Behind a Service a pod that ends must be heard of before it stops listening."""
    for service in of_kind(objects, "Service"):
        if service["spec"].get("clusterIP") == "None":
            continue
        for work in workloads(objects):
            if matches(service["spec"]["selector"], work.labels):
                if not all(at(one, "lifecycle", "preStop", "sleep", "seconds", default=0) for one in work.containers):
                    yield f"{work.name} stops listening while {name(service)} still sends clients to it"


def placement(objects, _):
    for work in workloads(objects):
        soon = {t["key"]: t.get("tolerationSeconds") for t in work.pod.get("tolerations", []) if t["effect"] == "NoExecute"}
        for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
            if soon.get(key) != 30:
                yield f"{work.name} stays on a node that is {key.rsplit('/', 1)[-1]} for {soon.get(key, 300)} s"
        spread = work.pod.get("topologySpreadConstraints", [])
        if not any(s["topologyKey"] == "kubernetes.io/hostname" and matches(s["labelSelector"], work.labels) for s in spread):
            yield f"{work.name} may put all its pods on one node"


def budgets(objects, _):
    """One for every workload, that lets some pod go, never a quorum's, and holds at any number of replicas."""
    found = of_kind(objects, "PodDisruptionBudget")
    for work in workloads(objects):
        own = [made for made in found if matches(made["spec"]["selector"], work.labels)]
        if len(own) != 1:
            yield f"{work.name} has {len(own)} disruption budgets, not 1"
            continue
        spec = own[0]["spec"]
        if "maxUnavailable" not in spec:
            yield f"{name(own[0])}: minAvailable is wrong after the next scaling"
            continue
        gone, must_stay = spec["maxUnavailable"], 1
        if work.component == "etcd":
            must_stay = work.replicas // 2 + 1
            if spec.get("unhealthyPodEvictionPolicy") == "AlwaysAllow":
                yield f"{name(own[0])}: a member that is not ready may hold the second copy"
        elif spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"{name(own[0])}: an outage blocks the drain of nodes"
        if not isinstance(gone, int) or gone < 1:
            yield f"{name(own[0])} lets nobody go: a node with such a pod can't be drained"
        elif work.replicas > 1 and work.replicas - gone < must_stay:
            yield f"{name(own[0])} lets {gone} of {work.replicas} go, {must_stay} must stay"
    for made in found:
        if not any(matches(made["spec"]["selector"], work.labels) for work in workloads(objects)):
            yield f"{name(made)} is about no pod"


def references(objects, facts):
    """What is named is there: in the manifests, among the Secrets that deploy/kustomize/secrets makes, or with others."""
    there = {(made["kind"], made["metadata"]["name"]) for made in objects}
    for work in workloads(objects):
        volumes = {volume["name"]: volume for volume in work.pod.get("volumes", [])}
        claimed = {claim["metadata"]["name"] for claim in at(work.made, "spec", "volumeClaimTemplates", default=[])}
        for volume in volumes.values():
            claim, config = at(volume, "persistentVolumeClaim", "claimName"), at(volume, "configMap", "name")
            secret = at(volume, "secret", "secretName")
            if claim and ("PersistentVolumeClaim", claim) not in there and claim not in CLAIMS_OF_OTHERS:
                yield f"{work.name}: nobody makes the claim {claim}"
            if config and ("ConfigMap", config) not in there:
                yield f"{work.name}: there is no ConfigMap {config}"
            if secret and secret not in facts.secrets:
                yield f"{work.name}: nobody makes the Secret {secret}"
        for one in work.containers:
            mounted = {mount["name"] for mount in one.get("volumeMounts", [])}
            for lost in mounted ^ (set(volumes) | claimed):
                yield f"{work.name}: {lost} is a volume or a mount, not both"
            for variable in one.get("env", []):
                key = at(variable, "valueFrom", "secretKeyRef")
                if key and key["key"] not in facts.secrets.get(key["name"], ()):
                    yield f"{work.name}: nobody makes the Secret {key['name']} with {key['key']}"
            for mount in one.get("volumeMounts", []):
                if "secret" in volumes.get(mount["name"], {}) and ("subPath" in mount or not mount.get("readOnly")):
                    yield f"{work.name}: {mount['mountPath']} is not renewed, or can be written"
    for made in of_kind(objects, "Secret"):
        yield f"{name(made)} does not belong into manifests"
    for made in of_kind(objects, "HorizontalPodAutoscaler"):
        target = made["spec"]["scaleTargetRef"]
        scaled = next((work for work in workloads(objects) if work.name == f"{target['kind']}/{target['name']}"), None)
        if scaled is None:
            yield f"{name(made)} scales nothing"
        elif "replicas" in scaled.made["spec"]:
            yield f"{scaled.name} sets its replicas back whenever it is applied, {name(made)} or not"


def services(objects, _):
    """They select something, by ports that it has; a name without an address of its own also lists those not ready."""
    for made in of_kind(objects, "Service"):
        spec = made["spec"]
        chosen = [work for work in workloads(objects) if matches(spec["selector"], work.labels)]
        if len(chosen) != 1:
            yield f"{name(made)} selects {len(chosen)} workloads, not 1"
        for port in spec["ports"]:
            if any(port["targetPort"] not in work.ports() for work in chosen):
                yield f"{name(made)}: its pods have no port {port['targetPort']}"
        if spec.get("clusterIP") == "None" and not spec.get("publishNotReadyAddresses"):
            yield f"{name(made)} hides those that are not ready, and without being found nobody gets ready"
    for made in of_kind(objects, "StatefulSet"):
        if not any(m["metadata"]["name"] == made["spec"]["serviceName"] for m in of_kind(objects, "Service")):
            yield f"{name(made)}: there is no Service {made['spec']['serviceName']}"
    for made in of_kind(objects, "ServiceMonitor"):
        chosen = [m for m in of_kind(objects, "Service")
                  if matches(made["spec"]["selector"], m["metadata"].get("labels", {}))]
        ports = {port["name"] for m in chosen for port in m["spec"]["ports"]}
        if not chosen or any(endpoint["port"] not in ports for endpoint in made["spec"]["endpoints"]):
            yield f"{name(made)} scrapes nothing"


def namespaces(objects, _):
    known = {made["metadata"]["name"]: made for made in of_kind(objects, "Namespace")}
    for made in known.values():
        if at(made, "metadata", "labels", "pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{name(made)} does not enforce Pod Security's `restricted`"
    for made in objects:
        if made["kind"] != "Namespace" and at(made, "metadata", "namespace") not in known:
            yield f"{name(made)} is in another namespace"


RULES = [hardened, accounts, probes, images, resources, grace, listener, placement, budgets, references, services, namespaces]
