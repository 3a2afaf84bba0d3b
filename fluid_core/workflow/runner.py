"""The whole pipeline, stage after stage: each a subprocess of its own script, all in one Ray, under one MLflow run.

Each pipeline knows by its own fingerprint whether its output is complete (workflow/stage.py). The workflow keeps beside
their records what it saw of them, `stages/workflow.json`; when the recipe and every record are as they were, nothing is
started: not Ray, and not the pipelines.
"""

import hashlib
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fluid_core.config import Recipe, RegistryConfig, config_hash
from fluid_core.entry import ray_session
from fluid_core.workflow.child import StageFailed, run_child
from fluid_core.workflow.preflight import check_machine
from fluid_core.workflow.stage import Stage, stage_digest, stage_record, write_json_atomic

STAGES = (
    "prepare_openmoji",
    "prepare_shapes",
    "train_tokenizer",
    "encode_dataset",
    "pretrain",
    "evaluate",
    "promote",
    "serve",
    "report",
)
PIPELINES = Path(__file__).resolve().parents[2] / "pipelines"
_EXTRA_ARGUMENTS = {"pretrain": ["--resume", "same"], "serve": ["--check"]}
_WITHOUT_RAY = ("prepare_openmoji", "prepare_shapes", "evaluate", "promote", "report")


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that a recipe has, in order."""
    absent = set()
    if recipe.data.openmoji is None:
        absent.add("prepare_openmoji")
    if recipe.data.shapes is None:
        absent.add("prepare_shapes")
    if recipe.image_tokenizer.train is None:
        absent.add("train_tokenizer")
    if absent >= {"prepare_openmoji", "prepare_shapes"}:
        absent.add("evaluate")  # it scores on these two; other data is scored by hand
    return [stage for stage in STAGES if stage not in absent]


class Workflow:
    """One run of all stages of a recipe."""

    def __init__(self, recipe: Recipe, config: str, overrides: list[str], force: str | None = None):
        self.recipe = recipe
        self.stages = stages_of(recipe)
        if force and force not in self.stages:
            raise ValueError(f"--force {force}: this recipe has no such stage; it has {', '.join(self.stages)}")
        self.arguments = ["--config", config, *(["--set", *overrides] if overrides else [])]
        self.state_path = recipe.run_dir / "stages" / "workflow.json"
        self.state: dict[str, Any] = {"recipe": None, "parent_run_id": None, "stages": {}, "forced": [], "begun": None}
        if self.state_path.is_file():
            self.state |= json.loads(self.state_path.read_text())
        self.recipe_hash = config_hash(recipe)
        self.same_recipe = self.state["recipe"] == self.recipe_hash
        self.force = force

    def complete(self) -> bool:
        """True when every stage is as the last complete workflow left it."""
        return not self.force and all(self._untouched(stage) for stage in self.stages)

    def run(self) -> dict[str, str]:
        """Run what is not complete.

        Returns:
            For each stage "done" or "skipped".

        Raises:
            ValueError: the machine or the recipe will not do; nothing was started.
            StageFailed: a stage failed; those before it are complete.
        """
        untouched = [stage for stage in self.stages if self._untouched(stage)]
        check_machine(self.recipe)
        if self.force:
            self._forget_from(self.force)
        self._save(recipe=self.recipe_hash)
        outcome: dict[str, str] = {}
        with ExitStack() as stack:
            environment: dict[str, str] | None = None
            ray_started = False
            redone = False
            for number, stage in enumerate(self.stages, start=1):
                if not redone and stage in untouched and stage not in self.state["forced"]:
                    outcome[stage] = "skipped"
                    continue
                environment = environment or os.environ | {"FLUID_PARENT_RUN_ID": self._parent_run()}
                if stage not in _WITHOUT_RAY and not ray_started:
                    stack.enter_context(ray_session(num_cpus=max(4, os.cpu_count() or 1)))
                    environment["RAY_ADDRESS"] = _ray_address()
                    # Ray puts a handler of its own over ours, which prints a stack.
                    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
                    ray_started = True
                before = self._record_written(stage)
                known = self.state["stages"].get(stage, {}).get("digest")
                _say(f"[{number}/{len(self.stages)}] {stage}")
                earlier = self._seconds_of_earlier_starts(stage)
                self._save(begun={"stage": stage, "recipe": self.recipe_hash, "at": time.time(), "earlier": earlier})
                started = time.monotonic()
                self._run_stage(stage, environment)
                seconds = earlier + time.monotonic() - started
                outcome[stage] = "skipped" if self._record_written(stage) == before else "done"
                digest = stage_digest(self.recipe, stage)
                # A stage that was redone with the same result leaves those after it as they are.
                redone = redone or known != digest
                if known not in (None, digest):
                    # What follows was made from another result, and must begin anew even if this workflow is killed now.
                    self._save(forced=self.stages[number:])
                self._remember(stage, digest, seconds if outcome[stage] == "done" else None)
        self._finish_parent("FINISHED", self._metrics())
        return outcome

    def _metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for stage in self.stages:
            for name, value in (stage_record(self.recipe, stage) or {}).get("metrics", {}).items():
                metrics[name if "/" in name else f"{stage}/{name}"] = value
        return metrics

    def summary(self, outcome: dict[str, str]) -> dict[str, Any]:
        """What summary.json holds. `seconds`: what the stage took, all its starts together, also where it is skipped now."""
        records = {stage: stage_record(self.recipe, stage) or {} for stage in self.stages}
        return {
            "stages": {
                stage: {
                    "status": outcome[stage],
                    "seconds": round(self.state["stages"].get(stage, {}).get("seconds") or 0.0, 1),
                }
                for stage in self.stages
            },
            "counts": {
                key: records["encode_dataset"].get("counts", {}).get(key, 0) for key in ("in", "out", "filtered", "quarantined")
            },
            "metrics": self._metrics(),
            "model": records["promote"].get("model", {}),
        }

    def _run_stage(self, stage: str, environment: dict[str, str]) -> None:
        forced = stage in self.state["forced"]
        if forced:
            # Taken off the list before the work: killed in the middle, it goes on instead of beginning again.
            self._save(forced=[name for name in self.state["forced"] if name != stage])
        if stage == "report":
            self._report(forced)
            return
        command = [sys.executable, str(PIPELINES / f"{stage}.py"), *self.arguments, *_EXTRA_ARGUMENTS.get(stage, [])]
        if forced:
            command.append("--force")
        try:
            run_child(command, self.recipe.run_dir / "logs" / f"{stage}.log", environment)
        except BaseException as error:
            self._finish_parent("FAILED" if isinstance(error, StageFailed) else "KILLED")
            if isinstance(error, StageFailed):
                # A pipeline that asks for its own --force does not know that the workflow's names a stage.
                told = str(error).replace("--force to", f"--force {stage} to")
                raise StageFailed(f"{stage}: {told}", error.code) from None
            raise
        if stage_record(self.recipe, stage) is None:
            raise StageFailed(f"{stage} ended well but left no record {self.recipe.run_dir / 'stages' / stage}.json", 1)

    def _report(self, forced: bool) -> None:
        from fluid_core.workflow.report import build_report

        digests = [stage_digest(self.recipe, stage) for stage in self.stages if stage != "report"]
        stage = Stage(self.recipe, "report", config=[], inputs=digests)
        if not stage.skip(forced):
            seconds = {name: self.state["stages"].get(name, {}).get("seconds") for name in self.stages}
            stage.finish([*build_report(self.recipe, self.stages, seconds)])

    # What was seen of each stage.

    def _record_sha256(self, stage: str) -> str | None:
        path = self.recipe.run_dir / "stages" / f"{stage}.json"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def _record_written(self, stage: str) -> int | None:
        """When the record was written, in ns: a stage that was redone may leave the very same record."""
        path = self.recipe.run_dir / "stages" / f"{stage}.json"
        return path.stat().st_mtime_ns if path.is_file() else None

    def _untouched(self, stage: str) -> bool:
        seen = self.state["stages"].get(stage, {})
        # Each stage has its own recipe hash: a workflow that was killed half-way has seen only some under the new recipe.
        if stage in self.state["forced"] or seen.get("recipe") != self.recipe_hash:
            return False
        if self._record_sha256(stage) != seen["record"]:
            return False
        record = stage_record(self.recipe, stage) or {"outputs": []}
        return all(Path(output).exists() for output in record["outputs"] if "://" not in output)

    def _seconds_of_earlier_starts(self, stage: str) -> float:
        """How long the stage ran before it was stopped or killed: until its log's last sign of life."""
        begun, log = self.state["begun"], self.recipe.run_dir / "logs" / f"{stage}.log"
        if begun is None or (begun["stage"], begun["recipe"]) != (stage, self.recipe_hash) or stage in self.state["forced"]:
            return 0.0
        return begun["earlier"] + (max(0.0, log.stat().st_mtime - begun["at"]) if log.is_file() else 0.0)

    def _remember(self, stage: str, digest: str, seconds: float | None) -> None:
        known = self.state["stages"].get(stage, {})
        if seconds is None:
            seconds = known.get("seconds") or (stage_record(self.recipe, stage) or {}).get("seconds")
        seen = {"recipe": self.recipe_hash, "record": self._record_sha256(stage), "digest": digest, "seconds": seconds}
        self.state["stages"][stage] = seen
        self._save(begun=None)

    def _forget_from(self, stage: str) -> None:
        redo = self.stages[self.stages.index(stage) :]
        self._save(forced=redo)
        for name in redo:
            (self.recipe.run_dir / "stages" / f"{name}.json").unlink(missing_ok=True)

    def _save(self, **changes: Any) -> None:
        self.state |= changes
        write_json_atomic(self.state_path, self.state)

    # One MLflow run is the parent of all.

    def _parent_run(self) -> str:
        from mlflow.exceptions import MlflowException

        from fluid_core.registry.mlflow_client import experiment_id, mlflow_client

        registry = self.recipe.registry
        try:
            client = mlflow_client(registry.tracking_uri)
            experiment = experiment_id(client, registry.experiment)
            known = self.state["parent_run_id"]
            if known and self.same_recipe and any(run.info.run_id == known for run in client.search_runs([experiment])):
                client.update_run(known, status="RUNNING")
                return known
            tags = {"fluid.recipe": self.recipe.name, "fluid.config_hash": config_hash(self.recipe)}
            run = client.create_run(experiment, run_name=f"{self.recipe.name} workflow", tags=tags)
        except MlflowException as error:
            raise ValueError(f"MLflow at {registry.tracking_uri} does not answer, see registry.tracking_uri: {error}") from None
        self._save(parent_run_id=run.info.run_id)
        return run.info.run_id

    def _finish_parent(self, status: str, metrics: dict[str, float] | None = None) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        from fluid_core.registry.mlflow_client import mlflow_client

        run_id = self.state["parent_run_id"]
        try:
            client = mlflow_client(self.recipe.registry.tracking_uri)
            if metrics:
                now = time.time_ns() // 1_000_000
                client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])
                client.log_artifact(run_id, str(self.recipe.run_dir / "report.html"))
            client.set_terminated(run_id, status=status)
        except MlflowException as error:
            _say(f"the MLflow run of the workflow could not be closed: {error}")


def where_to_look(recipe: Recipe, config: str) -> str:
    """The last lines of the workflow: what was made, and how to open it."""
    python = _shown(sys.executable)
    scripts = str(Path(python).parent)
    host = "127.0.0.1" if recipe.serving.host == "0.0.0.0" else recipe.serving.host
    uri = recipe.registry.tracking_uri
    mlflow = uri
    if uri.startswith("sqlite"):
        mlflow = f"{scripts}/mlflow ui --backend-store-uri {uri}   then http://127.0.0.1:5000, Model training (top left)"
    if uri != RegistryConfig().tracking_uri:
        scripts = f"MLFLOW_TRACKING_URI={uri} {scripts}"
    lines = {
        "report": str(recipe.run_dir / "report.html"),
        "samples": str(recipe.run_dir / "samples.png"),
        "scores": str(recipe.run_dir / "summary.json"),
        "MLflow": mlflow,
        "server": f"{python} pipelines/serve.py --config {config}   then http://{host}:{recipe.serving.port}/",
        "one image": f'{scripts}/fluid generate "red apple" --model models:/{recipe.registry.model_name}@champion -o out/',
    }
    return "\n".join(f"  {name:<10} {text}" for name, text in lines.items())


def _shown(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def _ray_address() -> str:
    import ray

    return os.environ.get("RAY_ADDRESS") or ray.get_runtime_context().gcs_address


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
