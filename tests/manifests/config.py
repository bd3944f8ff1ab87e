"""Rules over the settings within ConfigMaps: keys that the program reads, and that agree with the manifest around them."""

import re

from policies import CLAIMS_OF_OTHERS
from rendered import at, of_kind, settings, workloads

COMMANDS = {"coordinator": "coordinator.toml", "worker": "worker.toml"}
# Where each listens, and the port of the manifest that this is.
LISTENERS = {"coordinator": {"listen": "api", "node_listen": "node"},
             "worker": {"data_listen": "data", "health_listen": "health"}}


def ours(objects):
    """Workloads that run this program: each with its command, its container and its settings."""
    for work in workloads(objects):
        for one in work.containers:
            command = (one.get("args") or [""])[0]
            if command in COMMANDS:
                yield work, command, one, settings(objects, work)


def documented(text):
    """The keys of one of deploy/config's pages, those in comments too: {table: keys}, the top's table is ''."""
    keys, table = {"": set()}, ""
    for line in text.splitlines():
        head, key = re.match(r"\[(\w+)\]", line), re.match(r"(?:# )?([a-z_]+) = ", line)
        if head:
            table = head[1]
            keys[""].add(table)
            keys.setdefault(table, set())
        elif key:
            keys[table].add(key[1])
            inline = re.search(r"= \{(.*)\}", line)
            if inline:
                keys[key[1]] = set(re.findall(r"(\w+) =", inline[1]))
    return keys


def strange(config, known):
    """Keys of settings that deploy/config has not."""
    for key, value in config.items():
        if key not in known[""]:
            yield key
        for inner in value if isinstance(value, dict) else []:
            if inner not in known.get(key, ()):
                yield f"{key}.{inner}"


def keys(objects, facts):
    """Only what deploy/config has, for the program refuses the rest at its start."""
    for work, command, one, config in ours(objects):
        if config is None:
            yield f"{work.name}: its settings are in no ConfigMap"
            continue
        for key in strange(config, facts.config[COMMANDS[command]]):
            yield f"{work.name}: {key} is no key of {COMMANDS[command]}"
        for variable in one.get("env", []):
            if variable["name"].startswith("CONCLAVE_") and variable["name"] not in facts.environment:
                yield f"{work.name}: the program reads no {variable['name']}"


def addresses(objects, _):
    """It listens on the ports that the manifest declares, for everybody; others are told those; and whom it asks is there."""
    for work, command, one, config in ours(objects):
        ports = {port["name"]: port["containerPort"] for port in one["ports"]}
        for key, port in LISTENERS[command].items():
            if (config or {}).get(key) != f"0.0.0.0:{ports.get(port)}":
                yield f"{work.name}: {key} is {(config or {}).get(key)!r}, the port {port} is {ports.get(port)}"
        if set(ports) != set(LISTENERS[command].values()):
            yield f"{work.name} declares the ports {sorted(ports)}"
        told, port = {"coordinator": ("CONCLAVE_NODE_ADVERTISE", "node"), "worker": ("CONCLAVE_DATA_ADVERTISE", "data")}[command]
        environment = {variable["name"]: variable for variable in one.get("env", [])}
        if at(environment, told, "value") != f"$(POD_IP):{ports.get(port)}":
            yield f"{work.name}: {told} must be $(POD_IP):{ports.get(port)}"
        elif list(environment).index(told) < list(environment).index("POD_IP"):
            yield f"{work.name}: {told} comes before POD_IP, which it needs"
        for address in (config or {}).get("coordinator", "").split(",") if command == "worker" else []:
            host, _, number = address.strip().partition(":")
            found = [m for m in of_kind(objects, "Service") if m["metadata"]["name"] == host]
            if not any(str(p["port"]) == number and p["targetPort"] == "node" for m in found for p in m["spec"]["ports"]):
                yield f"{work.name}: no Service leads to {address}"
            if any(m["spec"].get("clusterIP") != "None" for m in found):
                yield f"{work.name}: {host} is one address, and each coordinator's is needed"


def files(objects, facts):
    """Files that settings name are mounted, and a Secret has them."""
    for work, _, one, config in ours(objects):
        volumes = {volume["name"]: volume for volume in work.pod["volumes"]}
        mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in one["volumeMounts"]}
        for path in paths(config or {}):
            folder, _, file = path.rpartition("/")
            secret = at(mounts.get(folder, {}), "secret", "secretName")
            if file not in facts.secrets.get(secret, ()):
                yield f"{work.name}: {path} is in no Secret that is mounted there"
        if "tls" not in (config or {}) or (config or {}).get("insecure"):
            yield f"{work.name} speaks in the clear"


def paths(config):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from paths(value)
        elif key in ("ca", "certificate", "key", "api_keys_file", "chat_template"):
            yield value


def stores(objects, _):
    """Several coordinators share etcd; one alone is never two; members of etcd are asked by the names that they have."""
    for work, command, one, config in ours(objects):
        if command != "coordinator" or config is None:
            continue
        store = config.get("store", {})
        kind = store.get("kind", "memory")
        if kind != "etcd" and (work.replicas != 1 or at(work.made, "spec", "strategy", "type") != "Recreate"):
            yield f"{work.name}: with a {kind} store two coordinators at a time are two clusters"
        if kind == "file":
            mounted = {mount["mountPath"]: mount for mount in one["volumeMounts"]}
            mount = mounted.get(store.get("data_dir"))
            claims = [v["name"] for v in work.pod["volumes"]
                      if at(v, "persistentVolumeClaim", "claimName") not in CLAIMS_OF_OTHERS | {None}]
            if mount is None or mount.get("readOnly") or mount["name"] not in claims:
                yield f"{work.name}: its store is not on a volume that can be written"
        for etcd in workloads(objects) if kind == "etcd" else []:
            if etcd.component == "etcd":
                host = f"{etcd.made['metadata']['name']}-{{}}.{etcd.made['spec']['serviceName']}"
                members = {host.format(i) for i in range(etcd.replicas)}
                port = etcd.ports()["client"]
                if set(store["endpoints"]) != {f"https://{member}:{port}" for member in members}:
                    yield f"{work.name}: the members of etcd are {sorted(members)}, asked are {store['endpoints']}"
                arguments = " ".join(etcd.containers[0]["args"])
                named = re.search(r"--initial-cluster=(\S+)", arguments)[1].split(",")
                peer = etcd.ports()["peer"]
                if set(named) != {f"{member.split('.')[0]}=https://{member}:{peer}" for member in members}:
                    yield f"{etcd.name}: --initial-cluster does not name its {etcd.replicas} members"


def scaling(objects, _):
    """The number of workers to wait for lets the cluster shrink: below it every death waits for a newcomer."""
    count = {command: (work, config) for work, command, _, config in ours(objects)}
    least = [made["spec"].get("minReplicas", 1) for made in of_kind(objects, "HorizontalPodAutoscaler")]
    if {"coordinator", "worker"} <= set(count):
        work, config = count["coordinator"]
        smallest = min([count["worker"][0].replicas, *least])
        if (config or {}).get("workers", 1) > max(1, smallest - 1):
            yield f"{work.name}: workers = {config['workers']} of {smallest}: a death would wait for a newcomer"


RULES = [keys, addresses, files, stores, scaling]
