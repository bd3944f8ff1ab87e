"""What `kubectl kustomize` rendered, as objects, and what is read out of them again and again."""

import subprocess
import tomllib
from dataclasses import dataclass

import yaml

# Where a kind keeps the template of its pods, and how many of them there are.
TEMPLATES = {
    "Deployment": (("spec", "template"), lambda spec: spec.get("replicas", 1)),
    "StatefulSet": (("spec", "template"), lambda spec: spec.get("replicas", 1)),
    "LeaderWorkerSet": (("spec", "leaderWorkerTemplate", "workerTemplate"),
                        lambda spec: spec["replicas"] * spec["leaderWorkerTemplate"]["size"]),
}


def render(folder):
    """Every object of a kustomization."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{folder} does not render: {done.stderr.strip()}")
    return [made for made in yaml.safe_load_all(done.stdout) if made]


def name(made):
    return f"{made['kind']}/{made['metadata']['name']}"


def of_kind(objects, *kinds):
    return [made for made in objects if made["kind"] in kinds]


def at(made, *path, default=None):
    for key in path:
        if not isinstance(made, dict) or key not in made:
            return default
        made = made[key]
    return made


@dataclass
class Workload:
    """Whatever makes pods."""
    name: str
    made: dict
    template: dict
    replicas: int

    @property
    def pod(self):
        return self.template["spec"]

    @property
    def labels(self):
        return self.template["metadata"]["labels"]

    @property
    def component(self):
        return self.labels.get("app.kubernetes.io/component", self.name)

    @property
    def containers(self):
        return self.pod["containers"]

    def ports(self):
        """The names and numbers that its containers declare."""
        return {port.get("name"): port["containerPort"] for one in self.containers for port in one.get("ports", [])}


def workloads(objects):
    found = []
    for made in of_kind(objects, *TEMPLATES):
        path, count = TEMPLATES[made["kind"]]
        found.append(Workload(name(made), made, at(made, *path), count(made["spec"])))
    return found


def matches(selector, labels):
    """Whether a plain selector (matchLabels, or a Service's) takes these labels. An empty one takes all."""
    if selector.get("matchExpressions"):
        raise SystemExit(f"matchExpressions are not understood here: {selector}")
    wanted = selector.get("matchLabels", {}) if set(selector) <= {"matchLabels", "matchExpressions"} else selector
    return all(labels.get(key) == value for key, value in wanted.items())


def settings(objects, workload):
    """The TOML that a workload's program is started with, parsed, or None where it is started with none."""
    for one in workload.containers:
        args = one.get("args", [])
        if "--config" in args:
            file = args[args.index("--config") + 1]
            mount = max((m for m in one["volumeMounts"] if file.startswith(m["mountPath"] + "/")),
                        key=lambda m: len(m["mountPath"]), default=None)
            volume = next((v for v in workload.pod["volumes"] if mount and v["name"] == mount["name"]), {})
            config = at(volume, "configMap", "name")
            made = next((m for m in of_kind(objects, "ConfigMap") if m["metadata"]["name"] == config), None)
            text = at(made, "data", file.rsplit("/", 1)[-1])
            return None if text is None else tomllib.loads(text)
    return None
