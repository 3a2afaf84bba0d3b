"""The checkpoints of a run: step, whether complete, world size, bytes.

    fluid checkpoints runs/demo
    fluid checkpoints runs/demo --verify --json
    fluid checkpoints s3://bucket/demo

RUN is a run's folder, a folder of checkpoints, or a s3:// prefix of them. A run that copies its checkpoints to S3 is listed
with what is on either side. `--verify` reads every file and compares checksums; `--pin STEP` keeps a checkpoint for good.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fluid_core.training.checkpoint import Checkpoint, list_checkpoints, pin
from fluid_core.training.remote import RemoteCheckpoint, RemoteCheckpoints, places_of_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("--verify", action="store_true", help="compare every file's checksum")
    parser.add_argument("--pin", type=int, metavar="STEP", help="never delete this checkpoint")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    root, uri = places_of_run(args.run_dir)
    if root is not None and not Path(args.run_dir).is_dir():
        raise ValueError(f"{args.run_dir} does not exist; name a run's folder, for example runs/demo")
    remote = RemoteCheckpoints(uri) if uri else None
    if args.pin is not None:
        _pin(root, remote, args.pin)
    rows = [_local_row(c, args.verify) for c in list_checkpoints(root)] if root else []
    rows += [_remote_row(remote, c, args.verify) for c in remote.list()] if remote else []
    rows.sort(key=lambda row: row["step"])
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            state = row.get("problem") or ("complete" if row["complete"] else "not complete")
            size = f"{row['bytes'] / 2**20:,.1f} MiB"
            print(
                f"step {row['step']:>9}  world size {row['world_size'] or '-'}  {size:>14}  {state}"
                f"{'  pinned' if row['pinned'] else ''}{'  on S3' if '://' in row['path'] else ''}"
            )
        if not rows:
            print(f"{root or uri}: no checkpoints")
    return 1 if any(row.get("problem") for row in rows) else 0


def _pin(root: Path | None, remote: RemoteCheckpoints | None, step: int) -> None:
    here = list_checkpoints(root) if root else []
    there = remote.list() if remote else []
    chosen = [c for c in here if c.step == step and c.complete]
    copied = [c for c in there if c.step == step and c.complete]
    if not chosen and not copied:
        steps = sorted({c.step for c in here} | {c.step for c in there})
        raise ValueError(
            f"{root or (remote and remote.uri)} has no complete checkpoint of step {step}; it has "
            f"{', '.join(str(s) for s in steps)}"
        )
    for checkpoint in chosen:
        pin(checkpoint)
    if remote and copied:
        remote.pin(step)


def _local_row(checkpoint: Checkpoint, verify: bool) -> dict[str, Any]:
    complete = checkpoint.complete
    row = {
        "step": checkpoint.step,
        "complete": complete,
        "world_size": checkpoint.state["world_size"] if complete else None,
        "bytes": checkpoint.bytes,
        "pinned": checkpoint.pinned,
        "path": str(checkpoint.path),
    }
    if verify:
        row["problem"] = checkpoint.problem()
    return row


def _remote_row(remote: RemoteCheckpoints, checkpoint: RemoteCheckpoint, verify: bool) -> dict[str, Any]:
    try:
        state = remote.state(checkpoint.step)
    except ValueError:
        state = None
    row = {
        "step": checkpoint.step,
        "complete": state is not None,
        "world_size": state["world_size"] if state else None,
        "bytes": checkpoint.bytes,
        "pinned": checkpoint.pinned,
        "path": checkpoint.uri,
    }
    if verify:
        row["problem"] = remote.problem(checkpoint)
    return row
