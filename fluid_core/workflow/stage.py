"""A stage: a piece of work whose output is keyed by a fingerprint of its inputs and config.

    stage = Stage(recipe, "encode_dataset", config=[recipe.encode, recipe.data], inputs=[...manifest hashes...])
    if stage.skip(force=args.force):
        return
    ... work ...
    stage.finish(outputs=["runs/demo/encoded/train"], metrics={...}, counts={...})

The record `<runs_dir>/<name>/stages/<stage>.json` is written last and atomically: a stage killed half-way has none and
runs again, going on from whatever its own ledger or checkpoints kept.
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from fluid_core.config import Recipe, config_hash


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def replace_folder(new: Path, target: Path) -> None:
    """Move the folder `new` to `target`, in the place of one that may be there, on the same file system.

    Killed at any moment, `target` is the whole old folder, absent, or the whole new one, never a part.
    """
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():  # moved away first: a folder is not removed at once
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def stage_record(recipe: Recipe, name: str) -> dict[str, Any] | None:
    """The record of a finished stage, or None."""
    path = recipe.run_dir / "stages" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def stage_digest(recipe: Recipe, name: str) -> str:
    """What a later stage puts among its inputs: changes whenever stage `name` was redone with another result."""
    record = stage_record(recipe, name)
    return "absent" if record is None else record["output_digest"]


class Stage:
    """One run of a stage; see the module's text."""

    def __init__(self, recipe: Recipe, name: str, config: list[Any], inputs: list[str] | None = None):
        self.name = name
        self.path = recipe.run_dir / "stages" / f"{name}.json"
        self.fingerprint = config_hash(name, *config, inputs or [])
        self.started = time.monotonic()

    def complete(self) -> bool:
        """True when a record with this fingerprint exists and every output it names is still there."""
        if not self.path.is_file():
            return False
        record = json.loads(self.path.read_text())
        return record["fingerprint"] == self.fingerprint and all(Path(o).exists() for o in record["outputs"] if "://" not in o)

    def skip(self, force: bool = False) -> bool:
        """True (and a line on stdout) when there is nothing to do."""
        if force or not self.complete():
            self.path.unlink(missing_ok=True)
            return False
        print(f"{self.name}: already complete for these inputs and this config")
        return True

    def finish(
        self,
        outputs: list[str | Path],
        metrics: dict[str, float] | None = None,
        counts: dict[str, int] | None = None,
        output_digest: str | None = None,
        **details: Any,
    ) -> None:
        """Write the record. `output_digest` identifies the result's content; by default the fingerprint stands for it."""
        write_json_atomic(
            self.path,
            {
                "stage": self.name,
                "fingerprint": self.fingerprint,
                "output_digest": output_digest or self.fingerprint,
                "seconds": round(time.monotonic() - self.started, 2),
                "outputs": [str(output) for output in outputs],
                "metrics": metrics or {},
                "counts": counts or {},
                **details,
            },
        )


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
