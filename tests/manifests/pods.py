"""The pods of the overlay cpu-dev as processes of this machine: with the settings, the environment and the Secrets that were
rendered for them, each at an address of its own on loopback. The workers' StatefulSet is scaled, restarted and hurt under
load: every request must be answered, and as it was before.

    pods.py PROGRAM SECRETS KEY      the YAML that deploy/kustomize/secrets printed, and the API key that it said
"""

import base64
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml

from rendered import at, of_kind, render, workloads

ROOT = Path(__file__).resolve().parents[2]
# Of whatever must come, however busy the machine is.
PATIENCE_SECONDS = 60
QUESTION = {"model": "demo", "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
            "temperature": 0.8, "max_tokens": 60}


def until(what, holds):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"{PATIENCE_SECONDS} s have passed, and still not: {what}")
        time.sleep(0.05)


def get(url, body=None, key=None):
    """Status and text of an answer; 0 where there is none."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=PATIENCE_SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error)


class Pod:
    """One process, in place of a pod with one container."""

    def __init__(self, cluster, work, ordinal, address):
        self.cluster, self.work, self.address = cluster, work, address
        self.name = f"{work.made['metadata']['name']}-{ordinal}"
        self.container = work.containers[0]
        self.folder = cluster.folder / self.name
        self.mount()

    def mount(self):
        """Writes what its volumes hold, settings with this machine's addresses and paths in them."""
        for mount in self.container["volumeMounts"]:
            volume = next(one for one in self.work.pod["volumes"] if one["name"] == mount["name"])
            folder = self.folder / mount["mountPath"].lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
            config, secret = at(volume, "configMap", "name"), at(volume, "secret", "secretName")
            for file, text in self.cluster.configs.get(config, {}).items():
                (folder / file).write_text(self.here(text))
            for file, content in self.cluster.secrets.get(secret, {}).items():
                (folder / file).write_bytes(content)

    def here(self, text):
        for path in (mount["mountPath"] for mount in self.container["volumeMounts"]):
            text = text.replace(path + "/", f"{self.folder}{path}/")
        text = text.replace("/models/demo", str(ROOT / "demo/model")).replace("0.0.0.0:", f"{self.address}:")
        return text.replace("conclave-coordinators:", f"{self.cluster.leader}:")

    def environment(self):
        given = {"status.podIP": self.address, "metadata.name": self.name}
        found = {}
        for variable in self.container["env"]:
            field, secret = at(variable, "valueFrom", "fieldRef", "fieldPath"), at(variable, "valueFrom", "secretKeyRef")
            value = given.get(field, variable.get("value", ""))
            if secret:
                value = self.cluster.secrets[secret["name"]][secret["key"]].decode()
            for earlier, known in found.items():
                value = value.replace(f"$({earlier})", known)
            found[variable["name"]] = value
        return found

    def start(self):
        command = [self.cluster.program, *(self.here(argument) for argument in self.container["args"])]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, env=self.environment(), stdout=log, stderr=log)
        return self

    def asks(self, probe):
        asked = self.container[probe]["httpGet"]
        return get(f"http://{self.address}:{self.work.ports()[asked['port']]}{asked['path']}")

    def ready(self):
        if self.process.poll() is not None:
            raise SystemExit(f"{self.name} ended with {self.process.returncode}:\n{(self.folder / 'log').read_text()}")
        return self.asks("readinessProbe")[0] == 200

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def gone(self):
        """It ends by itself, in the time that Kubernetes gives it."""
        grace = self.work.pod["terminationGracePeriodSeconds"]
        try:
            code = self.process.wait(grace)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{self.name} did not end within {grace} s") from None
        if code != 0:
            raise SystemExit(f"{self.name} ended with {code}:\n{(self.folder / 'log').read_text()}")


class Cluster:
    def __init__(self, program, secrets, folder):
        objects = render(ROOT / "deploy/kustomize/overlays/cpu-dev")
        self.program, self.folder = program, Path(folder)
        self.configs = {one["metadata"]["name"]: one["data"] for one in of_kind(objects, "ConfigMap")}
        self.secrets = {one["metadata"]["name"]: {key: base64.b64decode(text) for key, text in one["data"].items()}
                        for one in yaml.safe_load_all(Path(secrets).read_text()) if one}
        self.kinds = {work.component: work for work in workloads(objects)}
        # Of this run alone: the manifests' ports are fixed, addresses are plenty.
        self.net = f"127.{64 + os.getpid() % 64}.{os.getpid() // 64 % 256}"
        self.leader = f"{self.net}.1"
        self.coordinator = Pod(self, self.kinds["coordinator"], 0, self.leader)
        self.workers = []

    def scale(self, count):
        """As a StatefulSet whose pods come and go all at once: the highest ordinals first to go."""
        for ordinal in range(len(self.workers), count):
            self.workers.append(Pod(self, self.kinds["worker"], ordinal, f"{self.net}.{10 + ordinal}").start())
        leaving, self.workers = self.workers[count:], self.workers[:count]
        for pod in leaving:
            pod.terminate()
        for pod in leaving:
            pod.gone()

    def members(self, key):
        status, text = get(f"http://{self.leader}:8080/status", key=key)
        return sorted(one["id"] for one in json.loads(text)["members"] if one["ranks"]) if status == 200 else []

    def serves_on(self, count, key):
        names = [f"conclave-workers-{ordinal}" for ordinal in range(count)]
        until(f"{names} serve", lambda: self.members(key) == names and all(pod.ready() for pod in self.workers))

    def tell(self):
        """The end of every log, for whoever must find out why."""
        for log in sorted(self.folder.glob("*/log")):
            print(f"== {log.parent.name}", *log.read_text().splitlines()[-20:], sep="\n", file=sys.stderr)

    def kill(self):
        for pod in [self.coordinator, *self.workers]:
            pod.process.kill()


class Load:
    """Asks again and again, in two threads, until it is ended."""

    def __init__(self, url, key):
        self.url, self.key, self.open = url, key, True
        self.expected = [self.ask(seed) for seed in range(4)]
        if any(reason is None for reason, _ in self.expected):
            raise SystemExit(f"nothing is answered: {self.expected[0][1]}")
        self.answered, self.wrong = 0, []
        self.threads = [threading.Thread(target=self.run, args=(seed,)) for seed in range(2)]
        for thread in self.threads:
            thread.start()

    def ask(self, seed):
        status, text = get(self.url, json.dumps(QUESTION | {"seed": seed}).encode(), self.key)
        if status != 200:
            return None, f"{status}: {text}"
        choice = json.loads(text)["choices"][0]
        return choice["finish_reason"], choice["message"]["content"]

    def run(self, seed):
        while self.open:
            try:
                answer = self.ask(seed % 4)
            except Exception as error:  # a thread that is gone would find nothing wrong any more
                answer = error
            self.answered += 1
            if answer != self.expected[seed % 4]:
                self.wrong.append(answer)
            seed += 1

    def end(self):
        self.open = False
        for thread in self.threads:
            thread.join()
        if self.wrong:
            raise SystemExit(f"{len(self.wrong)} of {self.answered} requests went wrong, the first: {self.wrong[0]}")
        return self.answered


def life(cluster, key):
    cluster.coordinator.start()
    until("the coordinator lives", lambda: cluster.coordinator.asks("livenessProbe")[0] == 200)
    if cluster.coordinator.asks("readinessProbe")[0] == 200:
        raise SystemExit("a coordinator without workers is ready")
    first = cluster.kinds["worker"].replicas
    cluster.scale(first)
    cluster.serves_on(first, key)
    url = f"http://{cluster.leader}:8080/v1/chat/completions"
    if get(url, json.dumps(QUESTION).encode())[0] != 401:
        raise SystemExit("whoever has no key is let in")
    load = Load(url, key)
    try:
        for count in (4, 3, 1, 2):
            cluster.scale(count)
            cluster.serves_on(count, key)
        # A rolling restart: the highest first, each when the one before is ready.
        for pod in reversed(cluster.workers):
            pod.terminate()
            pod.gone()
            pod.start()
            cluster.serves_on(2, key)
        # A death; the pod comes back under its name.
        cluster.workers[0].process.kill()
        cluster.workers[0].process.wait()
        cluster.workers[0].start()
        cluster.serves_on(2, key)
    finally:
        answered = load.end()
    cluster.coordinator.terminate()
    cluster.coordinator.gone()
    return answered


def main(program, secrets, key):
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(str(Path(program).resolve()), secrets, folder)
        try:
            answered = life(cluster, key)
        except SystemExit:
            cluster.tell()
            raise
        finally:
            cluster.kill()
    print(f"pods of cpu-dev, scaled 2 -> 4 -> 3 -> 1 -> 2, restarted and killed: {answered} requests answered, none wrong")


if __name__ == "__main__":
    main(*sys.argv[1:])
