"""Rules over NetworkPolicies: the ways that they open are exactly the ways that are needed."""

from rendered import matches, name, of_kind, workloads

# From, to, port of the one that is spoken to. Whoever adds a port adds its way here, and says why in the manifest.
NEEDED = {
    ("client", "coordinator", "api"),
    ("monitoring", "coordinator", "api"),
    ("worker", "coordinator", "node"),
    ("coordinator", "coordinator", "node"),
    ("worker", "worker", "data"),
    ("monitoring", "worker", "health"),
    ("coordinator", "etcd", "client"),
    ("etcd", "etcd", "peer"),
    ("monitoring", "etcd", "metrics"),
}
OUTSIDE = {"client", "monitoring"}
DNS = {("UDP", 53), ("TCP", 53)}


def peers(objects, peer):
    """Who is meant: components of this namespace, or one of OUTSIDE, or the peer itself where it is neither."""
    space, pods = peer.get("namespaceSelector"), peer.get("podSelector")
    if set(peer) - {"namespaceSelector", "podSelector"}:
        return [str(peer)]
    if "client" in str(peer) and (space or pods) in ({"matchLabels": {"conclave/client": "true"}},):
        return ["client"]
    if space is not None and pods is None:
        where = space.get("matchLabels", {}).get("kubernetes.io/metadata.name")
        return ["monitoring"] if where == "monitoring" else [str(peer)]
    if space is None and pods is not None:
        return [work.component for work in workloads(objects) if matches(pods, work.labels)] or [str(peer)]
    return [str(peer)]


def opens(rule):
    return {(port.get("protocol", "TCP"), port.get("port")) for port in rule.get("ports", [{}])}


def ways(objects):
    """(from, to, port number) of every ingress rule, and of every egress rule but those for names."""
    into, out = set(), set()
    for policy in of_kind(objects, "NetworkPolicy"):
        chosen = [work.component for work in workloads(objects) if matches(policy["spec"]["podSelector"], work.labels)]
        for side, found in (("ingress", into), ("egress", out)):
            for rule in policy["spec"].get(side, []):
                # Whoever is left out means everybody, and so do ports.
                others = [who for peer in rule.get("from" if side == "ingress" else "to", [{}]) for who in peers(objects, peer)]
                ports = opens(rule)
                if side == "egress" and ports == DNS:
                    continue
                for own in chosen:
                    for other in others:
                        for _, port in ports:
                            found.add((other, own, port) if side == "ingress" else (own, other, port))
    return into, out


def closed(objects, _):
    """What is not opened is shut, in both directions, and every pod can ask for names."""
    policies = of_kind(objects, "NetworkPolicy")
    everyone = [policy["spec"] for policy in policies if policy["spec"]["podSelector"] == {}]
    if not any(set(spec["policyTypes"]) == {"Ingress", "Egress"} and not {"ingress", "egress"} & set(spec) for spec in everyone):
        yield "no NetworkPolicy denies all"
    names = [rule for spec in everyone for rule in spec.get("egress", [])]
    if not any(opens(rule) == DNS and rule.get("to") for rule in names):
        yield "no NetworkPolicy lets every pod ask for names, and only there"
    for policy in policies:
        if not any(matches(policy["spec"]["podSelector"], work.labels) for work in workloads(objects)):
            yield f"{name(policy)} is about no pod"


def opened(objects, _):
    """Each way that is needed is open at both ends, and no other way is."""
    by_component = {work.component: work for work in workloads(objects)}
    numbers = {(component, port): number for component, work in by_component.items() for port, number in work.ports().items()}
    needed = {(source, to, numbers.get((to, port))) for source, to, port in NEEDED
              if to in by_component and (source in OUTSIDE or source in by_component)}
    into, out = ways(objects)
    inner = {way for way in needed if way[0] not in OUTSIDE}
    for found, wanted, side in ((into, needed, "ingress"), (out, inner, "egress")):
        for source, to, port in sorted(wanted - found, key=str):
            yield f"{side}: {source} does not reach port {port} of {to}"
        for source, to, port in sorted(found - wanted, key=str):
            yield f"{side}: {source} reaches port {port} of {to}, and need not"


def declared(objects, _):
    """Every port that a container declares is one that somebody needs."""
    for work in workloads(objects):
        for port in work.ports():
            if not any(to == work.component and port == wanted for _, to, wanted in NEEDED):
                yield f"{work.name}: nobody needs port {port}"


RULES = [closed, opened, declared]
