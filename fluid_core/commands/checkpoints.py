"""The checkpoints of a run: step, whether complete, world size, bytes.

    fluid checkpoints runs/demo
    fluid checkpoints runs/demo --verify --json

RUN is a run's folder, or a folder of checkpoints. `--verify` reads every file and compares checksums; `--pin STEP` keeps a
checkpoint for good.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fluid_core.training.checkpoint import Checkpoint, list_checkpoints, pin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("--verify", action="store_true", help="compare every file's checksum")
    parser.add_argument("--pin", type=int, metavar="STEP", help="never delete this checkpoint")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    root = Path(args.run_dir)
    if not root.is_dir():
        raise ValueError(f"{root} does not exist; name a run's folder, for example runs/demo")
    root = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    found = list_checkpoints(root)
    if args.pin is not None:
        chosen = [c for c in found if c.step == args.pin and c.complete]
        if not chosen:
            raise ValueError(
                f"{root} has no complete checkpoint of step {args.pin}; it has {', '.join(str(c.step) for c in found)}"
            )
        pin(chosen[0])
    rows = [_row(c, args.verify) for c in found]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            state = row.get("problem") or ("complete" if row["complete"] else "not complete")
            size = f"{row['bytes'] / 2**20:,.1f} MiB"
            print(
                f"step {row['step']:>9}  world size {row['world_size'] or '-'}  {size:>14}  {state}{'  pinned' if row['pinned'] else ''}"
            )
        if not rows:
            print(f"{root}: no checkpoints")
    return 1 if any(row.get("problem") for row in rows) else 0


def _row(checkpoint: Checkpoint, verify: bool) -> dict[str, Any]:
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
