"""Rules over PromQL in alerts, the dashboard and the adapter's settings: it parses, and names what the program exports."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import yaml

from rendered import name, of_kind

# Put on by the scraper, beside what the program says of its own.
SCRAPED = {"namespace", "pod", "job", "instance", "service"}


def exported(text):
    """The series that a metrics.rs exports, and their labels."""
    names = dict(re.findall(r'const (\w+): &str = "(conclave_\w+)"', text))
    histograms = {names[key] for key in re.findall(r"describe_histogram!\((\w+),", text)}
    series = {value for value in names.values() if value not in histograms}
    series |= {one + suffix for one in histograms for suffix in ("_bucket", "_sum", "_count")}
    return series, set(re.findall(r'"(\w+)" =>', text)) | set(re.findall(r'add_global_label\("(\w+)"', text)) | {"le"}


def expressions(objects):
    """(where, expression) of every one, with what Grafana and the adapter put in filled in."""
    for made in of_kind(objects, "PrometheusRule"):
        for group in made["spec"]["groups"]:
            for rule in group["rules"]:
                yield f"{name(made)} {rule.get('alert', rule.get('record'))}", rule["expr"]
    for made in of_kind(objects, "ConfigMap"):
        if made["metadata"].get("labels", {}).get("grafana_dashboard"):
            for text in made["data"].values():
                board = json.loads(text)
                for panel in board["panels"]:
                    for target in panel["targets"]:
                        yield f"{name(made)} {panel['title']}", target["expr"].replace("$__rate_interval", "5m")
                for variable in board["templating"]["list"]:
                    asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
                    if asked:
                        yield f"{name(made)} ${variable['name']}", f"count by ({asked[2]}) ({asked[1]})"
    for made in of_kind(objects, "AdapterRules"):
        for rule in made["externalRules"]:
            yield f"{name(made)} {rule['name']['as']}", rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="n"')
            yield f"{name(made)} {rule['name']['as']}", rule["seriesQuery"]


def known(objects, facts):
    """Only series and labels that the program exports."""
    for where, expression in expressions(objects):
        plain = re.sub(r'"[^"]*"', '""', expression)
        for series in re.findall(r"\bconclave_\w+", plain):
            if series not in facts.series:
                yield f"{where}: the program exports no {series}"
        labels = set(re.findall(r"(\w+) ?=~?\"", plain)) | set(re.findall(r"(\w+) ?!=\"", plain))
        for listed in re.findall(r"\b(?:by|without) ?\(([^)]*)\)", plain):
            labels |= {label.strip() for label in listed.split(",")}
        for label in labels - facts.labels - SCRAPED:
            yield f"{where}: no series has the label {label}"


def parses(objects, facts):
    """promtool understands every expression."""
    if not facts.promtool:
        return
    rules = [{"record": f"r{i}", "expr": expression} for i, (_, expression) in enumerate(expressions(objects))]
    for made in of_kind(objects, "PrometheusRule"):
        yield from promtool("check", "rules", rules=made["spec"])
    if rules:
        yield from promtool("check", "rules", rules={"groups": [{"name": "all", "rules": rules}]})


def promtool(*command, rules, tests=None):
    """What promtool says against a rule file, and against tests of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rules.yaml"
        file.write_text(yaml.safe_dump(rules))
        if tests is not None:
            file = Path(folder) / "tests.yaml"
            file.write_text(yaml.safe_dump(tests))
        done = subprocess.run(["promtool", *command, str(file)], capture_output=True, text=True, cwd=folder)
        if done.returncode != 0:
            yield f"promtool {' '.join(command)}: {done.stdout.strip()} {done.stderr.strip()}"


def alerts(objects, facts):
    """Each alert fires in a test, is silent in another, and all tests hold."""
    for made in of_kind(objects, "PrometheusRule"):
        names = [rule["alert"] for group in made["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
        asked = [case for test in facts.alerts["tests"] for case in test["alert_rule_test"]]
        for alert in names:
            kinds = {bool(case.get("exp_alerts")) for case in asked if case["alertname"] == alert}
            if kinds != {True, False}:
                yield f"{name(made)} {alert}: no test in which it {'fires' if True not in kinds else 'is silent'}"
        for case in asked:
            if case["alertname"] not in names:
                yield f"tests ask for the alert {case['alertname']}, which is not there"
        if facts.promtool:
            yield from promtool("test", "rules", rules=made["spec"], tests=facts.alerts)


RULES = [known, parses, alerts]
