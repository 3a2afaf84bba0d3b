"""Run the whole pipeline of a recipe: data, tokenizer, encoding, training, evaluation, promotion, serving, report.

    python pipelines/run_workflow.py --config configs/demo.yaml [--force STAGE]

Each stage is a pipeline of its own. Killed at any point, the same command goes on where it was; run again when complete, it
does nothing. Results: <runs_dir>/<name>/{summary.json, samples.png, report.html, logs/}.
"""

import argparse
import signal
import sys
import time

from fluid_core.config import Recipe
from fluid_core.entry import run_pipeline
from fluid_core.workflow.child import StageFailed
from fluid_core.workflow.runner import STAGES, Workflow, where_to_look
from fluid_core.workflow.stage import write_json_atomic


def main(recipe: Recipe, args: argparse.Namespace) -> int | None:
    # Terminated is treated like Ctrl-C: the stage at work is asked to end, and the MLflow run is closed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    workflow = Workflow(recipe, args.config, args.overrides, args.force)
    started = time.monotonic()
    if workflow.complete():
        outcome = dict.fromkeys(workflow.stages, "skipped")
        print(f"{recipe.name}: complete already, nothing to do (--force STAGE runs again from a stage)")
    else:
        try:
            outcome = workflow.run()
        except StageFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 2 if error.code == 2 else 1
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        print(f"{recipe.name}: complete, {minutes} min {seconds} s")
    write_json_atomic(recipe.run_dir / "summary.json", workflow.summary(outcome))
    print(where_to_look(recipe, args.config))
    return None


if __name__ == "__main__":
    run_pipeline(main, __doc__, stages=STAGES)
