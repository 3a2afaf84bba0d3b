"""Notices that a node is about to be taken away (a spot instance, a drained node), as Ray Train passes them on.

Ray's own way to ask is a barrier of all workers, so they ask together, every few seconds, when rank 0's clock says so. After
the node is gone Ray starts the workers again, which does not count as one of `training.max_failures`.
"""

import sys
import time

_SECONDS = 5.0
"""Between two questions: as often as Ray looks for drained nodes itself."""


class Preemption:
    """Whether a notice came since this worker started; each is told once. Outside Ray there are none."""

    def __init__(self) -> None:
        ray = sys.modules.get("ray")  # in a worker of Ray it is; others need not import it
        self._in_ray = ray is not None and ray.is_initialized()
        self._asked = time.monotonic()
        self._told: object = None

    def due(self) -> bool:
        """Whether it is time to ask again (rank 0's answer counts for all)."""
        return self._in_ray and time.monotonic() - self._asked > _SECONDS

    def announced(self) -> bool:
        """True when there is a notice that was not told before. Collective: all workers or none call it."""
        import ray.train

        self._asked = time.monotonic()
        found = ray.train.get_preemption_info()
        new = found is not None and found != self._told
        self._told = found
        return new
