"""DeepSpeed on CPU starts without compiling anything."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from fluid_core.training.native import without_extensions
without_extensions()
import deepspeed, torch
deepspeed.init_distributed("gloo")
torch.distributed.destroy_process_group()
print("started")
"""


def test_no_extension_is_built(tmp_path: Path) -> None:
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "started" in done.stdout, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())
