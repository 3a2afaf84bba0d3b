"""Training while MLflow is away: all that one run says ends up in one MLflow run."""

import json
import sys
from pathlib import Path

from forked import Program

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from small_run import as_torchrun, small_recipe

from fluid_core.registry.lineage import code_version
from fluid_core.registry.mlflow_client import mlflow_client


def test_mlflow_is_away_for_the_whole_first_start(repository: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, workers=1, max_steps=4)
    blocker = tmp_path / "mlflow"
    blocker.write_text("a file where the database's folder should be")
    uri = f"sqlite:///{blocker}/mlflow.db"
    command = [str(repository / "pipelines" / "pretrain.py"), "--config", str(tmp_path / "recipe.yaml")]
    command += ["--set", f"registry.tracking_uri={uri}"]
    environment = as_torchrun()  # driver and worker in one, without Ray
    status, out = Program(command, tmp_path / "away.log", environment, repository).end()
    assert status == 0, out
    record = json.loads((recipe.training_dir / "run.json").read_text())
    assert record["tracking_run_id"] is None
    assert len(list((recipe.training_dir.parent / "tracking-spool").glob("*/events.jsonl"))) == 2, (
        "the driver's and the worker's"
    )

    blocker.unlink()
    command += ["--resume", "--set", "training.max_steps=6"]
    status, out = Program(command, tmp_path / "back.log", environment, repository).end()
    assert status == 0, out
    client = mlflow_client(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert run.info.run_id == json.loads((recipe.training_dir / "run.json").read_text())["tracking_run_id"]
    assert run.info.status == "FINISHED" and run.info.run_name == recipe.training_dir.name
    assert {m.step for m in client.get_metric_history(run.info.run_id, "loss")} == {1, 2, 3, 4, 5, 6}
    assert run.data.tags["fluid.run"] == record["tracking_key"] and run.data.tags["fluid.code"] == code_version()
    assert run.data.params["training.max_steps"] in ("4", "6") and len(run.inputs.dataset_inputs) == 1
    assert not list((recipe.training_dir.parent / "tracking-spool").glob("*/events.jsonl"))
