"""What every pipeline script shares: its command line, one-line errors, and the Ray session it runs in.

def main(recipe: Recipe, args: argparse.Namespace) -> None: ...

if __name__ == "__main__":
    run_pipeline(main, __doc__)
"""

import argparse
import errno
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml

from fluid_core.config import Recipe, load_recipe
from fluid_core.workflow.preflight import check_machine

ProgramError = (ValueError, FileNotFoundError, PermissionError, ConnectionError)
"""What a user can mend. Anything else is a defect of ours and keeps its traceback."""


class WorkFailed(Exception):
    """Work that disks, machines or the network ended, said in one line; nothing is wrong with what was asked for."""


_GLIBC_KEEPS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def keep_freed_memory() -> dict[str, str]:
    """Environment for workers that compute on the CPU: an allocator that keeps large buffers for the next step.

    glibc gives them back to the system when they are freed, and every step gets them again page by page. Told to keep them
    it searches long lists instead, so Ray's own copy of jemalloc takes its place where there is one (docs/training.md).
    """
    import ray

    jemalloc = Path(ray.__file__).parent / "core/libjemalloc.so"
    if not jemalloc.is_file():
        return _GLIBC_KEEPS
    # The settings for glibc go along: on a machine where this path does not exist, the loader says so and goes on with glibc.
    # Pages are kept for good once they were left alone for ten seconds (muzzy) and joined; pages in use (dirty) are not joined, so
    # keeping those for good would let memory grow without end.
    keeps = "muzzy_decay_ms:-1,oversize_threshold:0,narenas:1"
    return _GLIBC_KEEPS | {"LD_PRELOAD": str(jemalloc), "MALLOC_CONF": keeps}


def pipeline_parser(doc: str | None, stages: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The arguments that every pipeline takes; with `stages` (the workflow) `--force` wants the name of one of them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe, for example configs/demo.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        metavar="section.key=value",
        help="overrides: one or several, and it may repeat",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    if stages:
        parser.add_argument(
            "--force", choices=stages, metavar="STAGE", help=f"run again from this stage on: {', '.join(stages)}"
        )
    else:
        parser.add_argument("--force", action="store_true", help="do the work again even when its output is complete")
    return parser


def run_pipeline(
    main: Callable[[Recipe, argparse.Namespace], int | None],
    doc: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: list[str] | None = None,
    stages: Sequence[str] | None = None,
) -> None:
    """Parse, load the recipe, run `main(recipe, args)`, and exit: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    parser = pipeline_parser(doc, stages)
    if add_arguments:
        add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        recipe = load_recipe(args.config, args.overrides)
        if args.print_config:
            print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
            sys.exit(0)
        _leave_package(recipe)
        if not stages and not os.environ.get("RAY_ADDRESS"):  # the workflow looks by itself; in a cluster the work is elsewhere
            check_machine(recipe)
        sys.exit(main(recipe, args) or 0)
    except ProgramError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"error: the disk is full ({error.filename or recipe.runs_dir}): free some, then start again",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _leave_package(recipe: Recipe) -> None:
    """`ray job submit --working-dir` runs a job in a copy of the folder, which each node has for itself and Ray deletes: what a
    recipe names by a relative path is not there, and must not be written there. It is under FLUID_HOME (infra/Dockerfile sets it).

    Raises:
        ValueError: in such a copy, with neither FLUID_HOME nor an absolute `runs_dir`.
    """
    if "/_ray_pkg_" not in os.getcwd():
        return
    home = os.environ.get("FLUID_HOME")
    if home:
        os.chdir(home)
    elif not os.path.isabs(recipe.runs_dir):
        raise ValueError(
            f"runs_dir {recipe.runs_dir} would be inside of {os.getcwd()}, Ray's copy of the working directory, which every node has "
            "for itself and Ray deletes: name a folder that all nodes share, --set runs_dir=/FOLDER/runs, or set FLUID_HOME=/FOLDER "
            "on the nodes"
        )


def _start_local_ray(**options: Any) -> None:
    """`ray.init`, again when the machine was too busy for the 30 s that Ray gives its own processes to start."""
    import ray

    # Serve kills an HTTP proxy that takes longer than 5 s to start and gives up: a busy laptop takes longer.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    # Workers' logs are not sent to the driver: Ray's log monitor need not look for new ones ten times a second.
    os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
    os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "3600")
    for attempt in range(3):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:
            if attempt == 2 or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


@contextmanager
def _batch_policy() -> Iterator[None]:
    """What is started in the block inherits Linux' SCHED_BATCH: woken, it waits for a core instead of taking one from who computes."""
    if not hasattr(os, "sched_setscheduler") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@contextmanager
def ray_session(num_cpus: int | None = None, serves: bool = False) -> Iterator[None]:
    """Ray for the duration of a block.

    Inside `ray job submit` or the workflow (`RAY_ADDRESS` is set) it joins that cluster; when this process is connected
    already it does nothing; otherwise it starts a private local Ray in a temp folder of its own, so that a cluster that
    the user runs on this machine is never touched.

    `serves`: the private Ray's many small processes shall not interrupt the model at each message (docs/serving.md).
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address=os.environ["RAY_ADDRESS"], **quiet)
        scratch = None
    else:
        # Unix socket paths are limited to 107 bytes: a short folder under the system's temp folder, not under runs/.
        scratch = tempfile.TemporaryDirectory(prefix="fluid-ray-", ignore_cleanup_errors=True)
        with _batch_policy() if serves else nullcontext():
            _start_local_ray(_temp_dir=scratch.name, num_cpus=num_cpus, include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
        if scratch is not None:
            scratch.cleanup()
