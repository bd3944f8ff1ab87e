"""The manifests of deploy/kustomize: rendered, held against schemas, policies and promtool; then the checks themselves,
each of which must find what broken.yaml breaks.

    check.py SECRETS PROMTOOL      the YAML that deploy/kustomize/secrets printed; 1 where promtool can be run, else 0
"""

import copy
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

import compose
import config
import network
import policies
import promql
from rendered import name, render, workloads

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEPLOY = ROOT / "deploy/kustomize"
# The oldest that knows all that is used (preStop's sleep), one between, the newest that there are schemas for.
KUBERNETES = ("1.30", "1.34", "1.37")
# Rules that say little without promtool.
PROMTOOLS = {"parses", "alerts"}
CUSTOM = {file.stem: json.loads(file.read_text()) for file in (HERE / "schemas").glob("*.json")}


@dataclass
class Facts:
    """What rules need to know beside the manifests."""
    secrets: dict
    config: dict
    environment: set
    series: set
    labels: set
    alerts: dict
    promtool: bool


def facts(secrets, promtool):
    made = [one for one in yaml.safe_load_all(Path(secrets).read_text()) if one]
    command = "".join(file.read_text() for file in (ROOT / "src").glob("*.rs"))
    exported = [promql.exported(file.read_text()) for file in sorted(ROOT.glob("*/src/metrics.rs"))]
    return Facts(
        secrets={one["metadata"]["name"]: set(one["data"]) for one in made},
        config={file.name: config.documented(file.read_text()) for file in (ROOT / "deploy/config").glob("*.toml")},
        environment=set(re.findall(r'"(CONCLAVE_\w+)"', command)),
        series=set().union(*(series for series, _ in exported)),
        labels=set().union(*(labels for _, labels in exported)),
        alerts=yaml.safe_load((HERE / "alerts.yaml").read_text()),
        promtool=promtool,
    )


def schemas(objects, _):
    """Every field of every object is one that its kind has, in each version of Kubernetes."""
    for made in objects:
        if made["kind"] in CUSTOM:
            for error in jsonschema.Draft202012Validator(CUSTOM[made["kind"]]).iter_errors(made):
                yield f"{name(made)}: {error.json_path}: {error.message}"
            continue
        for version in KUBERNETES:
            yield from valid(made, name(made), version)
    # A custom kind's pods are pods.
    for work in workloads(objects):
        if work.made["kind"] in CUSTOM:
            for version in KUBERNETES:
                pods = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pods"}, "template": work.template}
                yield from valid(pods, work.name, version)


def valid(made, what, version):
    try:
        kubernetes_validate.validate(made, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{what}: Kubernetes {version}: {'.'.join(str(part) for part in error.path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"{what}: no schema for {made['apiVersion']} {made['kind']} of Kubernetes {version}"


RULES = [schemas, *policies.RULES, *config.RULES, *network.RULES, *promql.RULES, *compose.RULES]


def breaches(objects, known):
    """(rule, sentence) of whatever is wrong."""
    return [(rule.__name__, said) for rule in RULES for said in rule(objects, known)]


def foreign(kind, content):
    CUSTOM[kind] = {}
    return {**content, "kind": kind, "metadata": {"name": kind.lower(), "namespace": "conclave"}}


def everything():
    """Each kustomization by name, as objects."""
    found = {folder.name: render(folder) for folder in sorted((DEPLOY / "overlays").iterdir())}
    # Not Kubernetes' own, and checked beside what they belong to.
    found["hpa"].append(foreign("AdapterRules", yaml.safe_load((DEPLOY / "components/hpa/prometheus-adapter.yaml").read_text())))
    composed = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    composed["settings"] = {file.name: file.read_text() for file in (ROOT / "deploy/compose").glob("*.toml")}
    found["cpu-dev"].append(foreign("Compose", composed))
    # The base by itself is no cluster: it lacks a store. Its objects must be valid all the same.
    return found, render(DEPLOY / "base")


def place(into, key):
    """Where a key leads: itself, or in a list the index that it is, or that of the element for which `key=value` holds."""
    if not isinstance(into, list):
        return key
    field, _, value = key.partition("=")
    return next(i for i, one in enumerate(into) if one[field] == value) if value else int(key)


def broken(case, overlays):
    """The objects of an overlay with one thing broken."""
    objects = copy.deepcopy(overlays[case.get("in", "monitoring")])
    kind, _, called = case["object"].partition("/")
    # A generated ConfigMap's name ends in a hash.
    named = re.compile(re.escape(called) + "(-[a-z0-9]{10})?")
    made = next(one for one in objects if one["kind"] == kind and named.fullmatch(one["metadata"]["name"]))
    if case.get("drop"):
        objects.remove(made)
        return objects
    into, (*way, last) = made, case["at"].split(" ")
    for key in way:
        into = into[place(into, key)]
    last = place(into, last)
    if "replace" in case:
        before, after = case["replace"]
        if before not in into[last]:
            raise SystemExit(f"broken.yaml: {case['object']} does not say {before!r}")
        into[last] = into[last].replace(before, after)
    elif "set" in case:
        into[last] = case["set"]
    else:
        del into[last]
    return objects


def prove(overlays, known):
    """How many cases there are, and the rules that do not find what was broken for them."""
    cases, proven, failed = yaml.safe_load((HERE / "broken.yaml").read_text()), set(), []
    rules = {rule.__name__: rule for rule in RULES}
    if not known.promtool:
        cases = [case for case in cases if case["rule"] not in PROMTOOLS]
    for case in cases:
        found = list(rules[case["rule"]](broken(case, overlays), known))
        if any(case["finds"] in said for said in found):
            proven.add(case["rule"])
        else:
            failed.append(f"{case['rule']} finds {found} where {case['finds']!r} is wrong: {case}")
    unproven = set(rules) - proven - (set() if known.promtool else PROMTOOLS)
    return len(cases), failed + [f"no case of broken.yaml proves the rule {rule}" for rule in sorted(unproven)]


def main(secrets, promtool):
    known = facts(secrets, promtool == "1")
    overlays, base = everything()
    failed = [f"base: schemas: {said}" for said in schemas(base, known)]
    for overlay, objects in overlays.items():
        failed += [f"{overlay}: {rule}: {said}" for rule, said in breaches(objects, known)]
    for said in failed:
        print(said, file=sys.stderr)
    cases, unproven = prove(overlays, known)
    for said in unproven:
        print(f"self-test: {said}", file=sys.stderr)
    count = sum(len(objects) for objects in overlays.values())
    print(f"{len(overlays)} overlays, {count} objects, Kubernetes {', '.join(KUBERNETES)}: {len(failed)} breaches of "
          f"{len(RULES)} rules; {cases} broken manifests, {len(unproven)} not found")
    sys.exit(1 if failed or unproven else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
