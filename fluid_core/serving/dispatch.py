"""The way of a task from the gateway to a replica: admission, deadline, one retry when a replica dies, cancellation."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import ReplicaUnavailableError

from fluid_core.config import ServingConfig
from fluid_core.serving.errors import ApiError, bad_request, deadline_exceeded, overloaded, replica_lost, unavailable
from fluid_core.serving.metrics import ServingMetrics
from fluid_core.serving.tasks import ImageTask, TaskEvent

logger = logging.getLogger(__name__)

LOST = (
    RayActorError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError, ObjectLostError, ReplicaUnavailableError,
)  # fmt: skip
"""What Ray raises when a replica, its node, or what it answered is gone."""

BACKGROUND_DEADLINE_SECONDS = 24 * 3600.0


class Dispatcher:
    """Counts the images in flight and bounds them; `generator` is the handle of the Generator deployment."""

    def __init__(self, generator: Any, config: ServingConfig, metrics: ServingMetrics):
        self._generate, self._stream = generator.generate, generator.options(stream=True).stream
        self._config = config
        self._metrics = metrics
        self._finished: deque[tuple[float, int]] = deque(maxlen=64)
        self.in_flight = 0
        self.draining = False
        metrics.capacity.set(config.max_queued)

    async def run(self, task: ImageTask) -> AsyncGenerator[TaskEvent, None]:
        """The events of a task, without its `error`: that is raised.

        Raises:
            ApiError: refused (429, 503), failed, late (504), or lost with its replica twice (503).
        """
        self._admit(task)
        try:
            async with aclosing(self._with_retry(task)) as events:
                async for event in events:
                    yield event
        except ApiError as error:
            self._metrics.rejected.labels(error.code).inc()
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._metrics.cancelled.inc()
            raise
        finally:
            if not task.background:
                self.in_flight -= task.count
                self._metrics.in_flight.set(self.in_flight)

    async def images(self, task: ImageTask) -> tuple[dict[str, Any], list[TaskEvent]]:
        """(details of `started`, the finished images in order)."""
        started: dict[str, Any] = {}
        images: dict[int, TaskEvent] = {}
        async for event in self.run(task):
            if event.kind == "started":
                started = event.details or {}
            elif event.kind == "image":
                images[event.index] = event
        return started, [images[index] for index in sorted(images)]

    async def drained(self) -> None:
        """Refuse new work and return when nothing is in flight."""
        self.draining = True
        self._metrics.ready.set(0)
        while self.in_flight:
            await asyncio.sleep(0.05)

    def _admit(self, task: ImageTask) -> None:
        if task.background:
            return  # batch jobs bound themselves
        refusal = None
        if self.draining:
            refusal = unavailable("the server is shutting down")
        elif task.count > self._config.max_queued:
            refusal = bad_request(f"n: this server takes at most {self._config.max_queued} images at a time", "n")
        elif self.in_flight + task.count > self._config.max_queued:
            refusal = overloaded(self._retry_after())
        if refusal is not None:
            self._metrics.rejected.labels(refusal.code).inc()
            raise refusal
        self.in_flight += task.count
        self._metrics.in_flight.set(self.in_flight)

    def _retry_after(self) -> float:
        """Seconds until a quarter of the queue will have drained, at the pace of the last requests; between 1 and 60."""
        if len(self._finished) < 2:
            return 2.0
        span = time.monotonic() - self._finished[0][0]
        pace = sum(count for _, count in self._finished) / max(span, 1e-3)
        return min(60.0, max(1.0, self._config.max_queued / 4 / pace))

    async def _with_retry(self, task: ImageTask) -> AsyncGenerator[TaskEvent, None]:
        seconds = BACKGROUND_DEADLINE_SECONDS if task.background else self._config.deadline_seconds
        seconds = min(seconds, task.deadline or seconds)
        deadline = time.monotonic() + seconds
        delivered: set[int] = set()
        for attempt in (1, 2):
            try:
                async with aclosing(self._once(task, deadline, seconds)) as events:
                    async for event in events:
                        if event.kind == "image":
                            if event.index in delivered:
                                continue  # made again by the retry; the same seed gives the same image
                            delivered.add(event.index)
                        yield event
                return
            except LOST as error:
                logger.warning("a replica went away with a request (attempt %d): %s", attempt, type(error).__name__)
                if attempt == 2:
                    raise replica_lost() from None
                self._metrics.retries.inc()

    async def _once(self, task: ImageTask, deadline: float, seconds: float) -> AsyncGenerator[TaskEvent, None]:
        response = (self._stream if task.stream else self._generate).remote(task, deadline - time.monotonic())
        ended = False
        try:
            while True:
                try:
                    # The replica ends the task at its deadline; the second more is for a replica that hangs.
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline + 1 - time.monotonic()):
                        events: list[TaskEvent] = [await anext(response)] if task.stream else await response
                except TimeoutError:
                    raise deadline_exceeded(seconds) from None
                except TaskCancelledError:
                    raise replica_lost() from None
                for event in events:
                    ended = event.kind in ("error", "done")
                    if event.kind == "error":
                        raise ApiError(**(event.details or {}))
                    if event.kind == "done":
                        self._note(task, event.details or {})
                    yield event
                if ended:
                    return
        finally:
            if not ended:
                response.cancel()

    def _note(self, task: ImageTask, details: dict[str, Any]) -> None:
        self._finished.append((time.monotonic(), task.count))
        self._metrics.images.labels(details["model"]).inc(task.count)
        self._metrics.model.clear()
        self._metrics.model.labels(details["model"]).set(1)
        self._metrics.queue_seconds.observe(details["queue_seconds"])
        self._metrics.generation_seconds.observe(details["generation_seconds"])
        self._metrics.batch_size.observe(details["batch_size"])
