"""What to do about a step that must not be applied, and about a worker that stands still.

A step is a strike when the global loss or gradient norm is not finite, or the norm is `spike_factor` times its running
mean. All workers see the same two numbers (both are all-reduced), so they always agree, also when one worker alone had the
bad batch. A strike is skipped: weights, optimizer state and EMA stay as they are. After `max_strikes` in a row the run goes
back to the last good checkpoint and skips the samples since then; after MAX_ROLLBACKS to the same one it ends. A data set
that joins the mixture changes which norms are to be expected: their mean is then taken anew.
"""

import faulthandler
import math
import os
import threading
import time
from pathlib import Path

from fluid_core.training.notices import say

_WARM_UP = 50
MAX_ROLLBACKS = 3


class HealthPolicy:
    """Decides about each step; identical on all workers. Its state belongs to a checkpoint."""

    def __init__(self, spike_factor: float, max_strikes: int):
        self.spike_factor, self.max_strikes = spike_factor, max_strikes
        self.mean_norm = 0.0
        self.seen = 0
        self.strikes = 0
        self.phase = 0

    def enter(self, phase: int) -> None:
        """The mixture's phase that the next step is in; a new one begins without a mean."""
        if phase != self.phase:
            self.phase, self.mean_norm, self.seen = phase, 0.0, 0

    def reason(self, loss: float, norm: float) -> str | None:
        """Why this step must be skipped, or None."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(norm) or norm < 0:  # DeepSpeed marks a norm that is not finite with -1
            return "gradient norm is not finite"
        if self.seen >= _WARM_UP and norm > self.spike_factor * self.mean_norm:
            return f"gradient norm {norm:.3g} is over {self.spike_factor:g} times its mean {self.mean_norm:.3g}"
        return None

    def record(self, norm: float, reason: str | None) -> bool:
        """Count the step; True when it is time to roll back."""
        if reason is None:
            self.strikes = 0
            self.seen += 1
            self.mean_norm += (norm - self.mean_norm) / min(self.seen, 100)
            return False
        self.strikes += 1
        return self.strikes >= self.max_strikes

    def state(self) -> dict[str, float]:
        return {"mean_norm": self.mean_norm, "seen": self.seen, "strikes": self.strikes, "phase": self.phase}

    def load(self, state: dict[str, float]) -> None:
        self.mean_norm, self.seen = state["mean_norm"], int(state["seen"])
        self.strikes, self.phase = int(state["strikes"]), int(state["phase"])


class Watchdog:
    """Ends the process when `beat` was not called for `seconds`: a hung collective never returns, a dead worker is restarted.

    `seconds` must be more than anything takes that lies between two beats (docs/training.md lists them), not a step alone.

    The stacks of all threads go to `<folder>/hang_rank_<rank>.txt` first.
    """

    def __init__(self, seconds: float, folder: Path, rank: int):
        self.seconds, self.rank, self.path = seconds, rank, folder / f"hang_rank_{rank}.txt"
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="fluid-watchdog")
        self._thread.start()

    def beat(self) -> None:
        self._last = time.monotonic()

    def close(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(5.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                with open(self.path, "w") as file:
                    file.write(f"no step for {self.seconds:.0f} s\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                say(
                    self.path.parent,
                    f"watchdog: worker {self.rank} made no step for {self.seconds:.0f} s and ends; stacks in {self.path}",
                )
                os._exit(70)
