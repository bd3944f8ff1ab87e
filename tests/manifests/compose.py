"""Rules over deploy/compose.yaml, as far as no container is needed for them."""

import re
import tomllib

from config import strange
from policies import GRACE_MARGIN_SECONDS
from rendered import of_kind


def composed(objects, facts):
    """Hardened like the pods; settings with keys that are read; stopped later than drained; nothing open beyond this host."""
    for made in of_kind(objects, "Compose"):
        for name, service in made["services"].items():
            if service.get("read_only") is not True or service.get("cap_drop") != ["ALL"]:
                yield f"{name} keeps capabilities, or can write its root"
            alone = service.get("network_mode") == "none"
            if not alone and (service.get("cap_add") or service.get("user", "65532:65532").startswith("0")):
                yield f"{name} is root on a network"
            if service["image"].partition(":")[2] in ("", "latest"):
                yield f"{name}: image {service['image']} is whatever was built last"
            for port in service.get("ports", []):
                if not port.startswith("127.0.0.1:"):
                    yield f"{name}: {port} is open to other hosts"
            for variable in service.get("environment", {}):
                if variable not in facts.environment:
                    yield f"{name}: the program reads no {variable}"
            if service.get("command", [""])[0] not in ("coordinator", "worker"):
                continue
            page = f"{service['command'][0]}.toml"
            settings = tomllib.loads(made["settings"][page])
            for unknown in strange(settings, facts.config[page]):
                yield f"{name}: {unknown} is no key of {page}"
            given = int(re.fullmatch(r"(\d+)s", service.get("stop_grace_period", "10s"))[1])
            if given < settings["drain_seconds"] + GRACE_MARGIN_SECONDS:
                yield f"{name} is killed after {given} s, it drains for {settings['drain_seconds']}"


RULES = [composed]
