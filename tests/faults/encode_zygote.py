"""Run by test_encode_kill.py: forks encoders from a process that has everything loaded, and kills them at random moments.

python encode_zygote.py DATA FOLDER SEEDS prints one JSON object a seed: {"seed", "kills", "same"}.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

from encoding_support import content, encode_here, recipe_values  # noqa: E402

from fluid_core.config import Recipe  # noqa: E402


def child(recipe: Recipe) -> int:
    pid = os.fork()
    if pid == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 2)
        try:
            encode_here(recipe)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def main(data: str, folder: Path, seeds: int) -> None:
    recipe = Recipe.model_validate(recipe_values(folder, [data], folder / "undisturbed"))
    started = time.monotonic()
    assert os.waitpid(child(recipe), 0)[1] == 0
    duration = time.monotonic() - started
    expected = content(folder / "undisturbed")
    for seed in range(seeds):
        rng = random.Random(seed)
        output = folder / f"out{seed}"
        recipe = Recipe.model_validate(recipe_values(folder, [data], output))
        kills = 0
        while not kills:
            shutil.rmtree(output, ignore_errors=True)
            for _ in range(3):
                pid = child(recipe)
                # The measured run was the first and so the slowest; those that go on where one was killed are shorter, and meet
                # their kill at the end of the work or after it.
                time.sleep(rng.random() * 0.7 * duration)
                os.kill(pid, signal.SIGKILL)
                kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            if not kills:  # it was measured on a machine that was much busier then
                duration *= 0.7
        finished = os.waitpid(child(recipe), 0)[1] == 0
        print(json.dumps({"seed": seed, "kills": kills, "same": finished and content(output) == expected}), flush=True)
        shutil.rmtree(output)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
