"""Run the benchmarks and print their table: every ratio is measured side by side in one run.

    make bench                                   all rooms
    python -m benchmarks.run model serve         some of them

Each room (benchmarks/{model,gpu,encode,train,serve}.py; gpu where there is one) has `rows()`: dicts of name, ours, reference, ratio, unit, target. Results
go to benchmarks/results/<date>.json with what the machine was. A room runs in a process of its own; one that fails is told
in the table, and the exit code is 1.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOMS = ("model", "gpu", "encode", "train", "serve")
ROOT = Path(__file__).resolve().parents[1]
_CHILD = """
import importlib, json, sys
rows = importlib.import_module(f"benchmarks.{sys.argv[1]}").rows()
json.dump(rows, open(sys.argv[2], "w"))
"""


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    model = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def run_room(room: str) -> tuple[list[dict[str, Any]], str | None]:
    """The room's rows, and what went wrong if something did."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        done = subprocess.run([sys.executable, "-c", _CHILD, room, file.name], cwd=ROOT)
        if done.returncode:
            return [], f"benchmarks/{room}.py ended with exit code {done.returncode}"
        return json.loads(Path(file.name).read_text()), None


def as_table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns."""

    def number(value: Any) -> str:
        return "" if value is None else f"{value:,.4g}" if isinstance(value, int | float) else str(value)

    headings = ("name", "ours", "reference", "ratio", "unit", "target")
    cells = [headings, *(tuple(number(row.get(heading)) for heading in headings) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(headings))]
    lines = []
    for line in cells:
        shown = [
            cell.rjust(width) if 0 < i < 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(shown).rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(ROOMS)} (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    args = parser.parse_args(argv)
    unknown = [room for room in args.rooms if room not in ROOMS]
    if unknown:
        parser.error(f"unknown room {unknown[0]!r}; one of {', '.join(ROOMS)}")
    about, found, failures = machine(), {}, []
    for room in args.rooms or [room for room in ROOMS if room != "gpu" or about["gpu"]]:
        print(f"measuring {room} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        rows, failure = run_room(room)
        found[room] = {"seconds": round(time.monotonic() - started, 1), "rows": rows, "failure": failure}
        if failure:
            failures.append(failure)
        print(f"\n{room} ({found[room]['seconds']:.0f} s)\n{failure or as_table(rows)}\n", flush=True)
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{now}.json"
    command = f"python -m benchmarks.run {' '.join(args.rooms)}".strip()
    path.write_text(json.dumps({"date": now, "command": command, "machine": about, "rooms": found}, indent=1) + "\n")
    print(f"written to {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
