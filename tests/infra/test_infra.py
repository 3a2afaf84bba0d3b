"""Dashboards and alerts name metrics that are exported; manifests name files, keys and images that exist."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import hcl2
import promql_parser
import pytest
import ray
import yaml

from fluid_core.config import load_recipe
from fluid_core.serving.metrics import ServingMetrics

RAY = Path(ray.__file__).parent


def own_metrics() -> set[str]:
    """Every series name of the server's /metrics."""
    names: set[str] = set()
    for family in ServingMetrics().registry.collect():
        names.add(family.name)
        if family.type == "counter":
            names.add(f"{family.name}_total")
        if family.type == "histogram":
            names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    return names


def ray_metrics() -> set[str]:
    """Names that Ray's own code gives to its metrics: strings in the files that define them, and Ray Data's table."""
    from ray.data._internal.execution.interfaces.op_runtime_metrics import OpRuntimeMetrics

    names = {f"data_{metric.name}" for metric in OpRuntimeMetrics.get_metrics()}
    files = ["data/_internal/stats.py", "dashboard/modules/reporter/reporter_agent.py"]
    files += [f"train/v2/_internal/metrics/{name}.py" for name in ("controller", "worker")]
    for file in files:
        for node in ast.walk(ast.parse((RAY / file).read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return {f"ray_{name}" for name in names}


def metrics_of(expression: str) -> set[str]:
    """The metric names in a PromQL expression; raises ValueError where it does not parse."""
    promql_parser.parse(expression)
    without_labels = re.sub(r"\{[^}]*\}|\b(by|without)\s*\([^)]*\)|\"[^\"]*\"", " ", expression)
    return set(re.findall(r"\b(?:fluid|ray)_\w+", without_labels))


def expressions(repository: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted((repository / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            found += [(f"{path.name}: {panel['title']}", target["expr"]) for target in panel["targets"]]
    rules = yaml.safe_load((repository / "infra" / "prometheus" / "rules.yaml").read_text())
    for group in rules["groups"]:
        found += [(f"rules.yaml: {rule['alert']}", rule["expr"]) for rule in group["rules"]]
    return found


def test_every_metric_of_dashboards_and_alerts_is_exported(repository: Path) -> None:
    known = own_metrics() | ray_metrics()
    unknown = {(where, name) for where, text in expressions(repository) for name in metrics_of(text) if name not in known}
    assert not unknown
    assert all(metrics_of(text) for _, text in expressions(repository)), "an expression without a metric of ours"


def test_the_check_itself_notices_a_wrong_name() -> None:
    assert metrics_of('sum(rate(fluid_imagess_total{model="ray_x"}[1m])) by (ray_train_run_name)') == {"fluid_imagess_total"}
    assert "fluid_imagess_total" not in own_metrics() and "fluid_images_total" in own_metrics()
    with pytest.raises(ValueError):
        metrics_of("sum(rate(fluid_images_total[1m])")


def test_dashboards_are_complete(repository: Path) -> None:
    boards = [json.loads(path.read_text()) for path in sorted((repository / "dashboards").glob("*.json"))]
    assert [board["uid"] for board in boards] == ["fluid-encode", "fluid-serve", "fluid-train"]
    for board in boards:
        ids = [panel["id"] for panel in board["panels"]]
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(set(ids)) == len(ids) and len(set(places)) == len(places)
        assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in board["panels"])


def test_alerts_say_what_to_do(repository: Path) -> None:
    rules = yaml.safe_load((repository / "infra" / "prometheus" / "rules.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["annotations"]["summary"] and rule["annotations"]["action"] and rule["labels"]["severity"]


def documents(repository: Path) -> list[tuple[str, dict[str, Any]]]:
    paths = [*sorted((repository / "infra").glob("kuberay/*.yaml")), *sorted((repository / "infra").glob("argo/*.yaml"))]
    return [(path.name, document) for path in paths for document in yaml.safe_load_all(path.read_text())]


def containers(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for item in value for found in containers(item)]
    if not isinstance(value, dict):
        return []
    own = [value] if "image" in value and ("name" in value or "command" in value) else []
    return own + [found for item in value.values() for found in containers(item)]


def test_kubernetes_manifests_agree_with_themselves_and_the_code(repository: Path) -> None:
    kinds = [document["kind"] for _, document in documents(repository)]
    assert sorted(kinds) == ["PersistentVolumeClaim", "RayCluster", "RayJob", "RayService", "Workflow"]
    claims = {
        document["metadata"]["name"] for _, document in documents(repository) if document["kind"] == "PersistentVolumeClaim"
    }
    for name, document in documents(repository):
        text = json.dumps(document)
        for version in re.findall(r'"rayVersion": "([^"]+)"', text):
            assert version == ray.__version__, name
        assert set(re.findall(r'"claimName": "([^"]+)"', text)) <= claims
        for config in re.findall(r"configs/[\w.-]+\.yaml", text):
            assert (repository / config).is_file(), f"{name}: {config}"
        for script in re.findall(r"pipelines/\w+\.py", text):
            assert (repository / script).is_file(), f"{name}: {script}"
        for container in containers(document):
            assert container["image"] == "fluid:latest" and container["resources"]["requests"], name


def test_overrides_in_manifests_are_valid_settings(repository: Path) -> None:
    job = next(document for name, document in documents(repository) if document["kind"] == "RayJob")
    words = job["spec"]["entrypoint"].split()
    overrides = words[words.index("--set") + 1 :]
    assert load_recipe(repository / words[words.index("--config") + 1], overrides).training.workers == 32
    service = next(document for name, document in documents(repository) if document["kind"] == "RayService")
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
    own = yaml.safe_load((repository / "infra" / "serve" / "demo.yaml").read_text())["applications"][0]
    assert own["import_path"] == application["import_path"]
    assert load_recipe(repository / own["args"]["config"]).name == "demo"
    config = repository / Path(application["args"]["config"]).relative_to("/home/ray/fluid")
    recipe = load_recipe(config, application["args"]["overrides"])
    grace = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > recipe.serving.drain_seconds


def test_the_argo_steps_call_pipelines_that_take_their_arguments(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workflow = next(document for _, document in documents(repository) if document["kind"] == "Workflow")
    templates = {template["name"]: template for template in workflow["spec"]["templates"]}
    values = {f"workflow.parameters.{item['name']}": item["value"] for item in workflow["spec"]["arguments"]["parameters"]}
    monkeypatch.chdir(repository)
    for (step,) in templates["all"]["steps"]:
        (parameter,) = step["arguments"]["parameters"]
        (command,) = templates[step["template"]]["container"]["args"]
        for name, value in (values | {f"inputs.parameters.{parameter['name']}": parameter["value"]}).items():
            command = command.replace("{{" + name + "}}", value)
        words = command.split(" -- python ")[1].split()
        monkeypatch.setattr(sys, "argv", [*words, "--print-config"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(words[0], run_name="__main__")
        assert not end.value.code, command
        assert yaml.safe_load(capsys.readouterr().out)["registry"]["tracking_uri"] == "http://mlflow.mlflow.svc:5000"


def test_what_the_image_copies_is_there(repository: Path) -> None:
    lines = (repository / "infra" / "Dockerfile").read_text().splitlines()
    sources = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert len(sources) > 5
    for source in sources:
        assert (repository / source).exists(), source


def test_terraform_is_valid_hcl_and_every_variable_is_declared(repository: Path) -> None:
    folder = repository / "infra" / "terraform"
    texts = {path.name: path.read_text() for path in sorted(folder.glob("*.tf"))}
    parsed = {name: hcl2.loads(text) for name, text in texts.items()}
    declared = {key.strip('"') for block in parsed["variables.tf"]["variable"] for key in block if not key.startswith("__")}
    used = set(re.findall(r"\bvar\.(\w+)", "\n".join(texts.values())))
    assert used == declared
    for name, text in texts.items():
        assert text.endswith("}\n") and "\t" not in text and not re.search(r" +\n", text), f"{name} is not formatted"
