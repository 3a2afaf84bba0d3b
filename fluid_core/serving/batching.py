"""Continuous batching: images join and leave a running batch at autoregressive step boundaries.

One thread owns the model. Every turn it admits waiting images into free places, runs one autoregressive step for each group
of images that can share it (same grid, head steps and solver; seeds, step counts, guidance and age may differ), hands the
images that are finished to a second thread, and drops those whose client went away or whose deadline has passed. The second
thread decodes them and reports, while the places they had are in use again.

Images of one age cost least: their text is aligned and their latents are decoded together. So while images wait for
every free place, those places wait for others that will be free within two steps; under load the images fall into one group
or a few this way, and stay in them.

An image is the same alone or in company: the engine's draws depend on (seed, token, step) alone.
"""

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

if TYPE_CHECKING:
    from fluid_core.generation.engine import DecodeSlot, GenerationRequest
    from fluid_core.generation.pipeline import FluidPipeline

logger = logging.getLogger(__name__)


PATIENCE = 2
"""Steps that free places wait for others."""


class Expired(Exception):
    """The job's deadline passed."""


class Closed(Exception):
    """The batcher takes no more jobs: another version took over."""


@dataclass(eq=False)
class Job:
    """The images of one client request.

    `make_requests` runs on the batching thread when the job is admitted (it encodes the prompt); a ValueError from it is the
    client's fault. `on_partial(index, image, slot)` is called there too, `on_image(index, image, slot)` on the decoding thread,
    `on_end(error)` on either; they must return at once. `on_end` is called exactly once, unless the job was cancelled.
    """

    count: int
    make_requests: Callable[[], list["GenerationRequest"]]
    on_image: Callable[[int, Image.Image, "DecodeSlot"], None]
    on_end: Callable[[BaseException | None], None]
    on_partial: Callable[[int, Image.Image, "DecodeSlot"], None] | None = None
    partial_images: int = 0
    deadline: float = float("inf")
    background: bool = False
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    remaining: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        """The client went away: the job's images are dropped at the next step boundary."""
        self.cancelled = True


@dataclass(eq=False)
class _Running:
    job: Job
    index: int
    slot: "DecodeSlot"

    @property
    def group(self) -> tuple[Any, ...]:
        request = self.slot.request
        return (tuple(request.grid), request.head_steps, request.solver)

    @property
    def wants_preview(self) -> bool:
        """Previews are spread evenly over the steps, and never after the last: that one is the image itself."""
        job, steps = self.job, len(self.slot.counts)
        if job.on_partial is None or self.slot.done:
            return False
        return self.slot.step in {round(steps * (i + 1) / (job.partial_images + 1)) for i in range(job.partial_images)}


class ContinuousBatcher:
    """Owns `pipeline` and the threads that run it."""

    def __init__(self, pipeline: "FluidPipeline", max_batch_size: int):
        self.pipeline = pipeline
        self.max_batch_size = max_batch_size
        self.steps = 0
        self.images = 0
        self.last_batch = 0
        self._waited = 0
        self._waiting: dict[bool, deque[Job]] = {False: deque(), True: deque()}
        self._starting: deque[tuple[Job, int, GenerationRequest]] = deque()
        self._running: list[_Running] = []
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="fluid-decoder")
        self._decoding: Future[None] | None = None
        self._failed: deque[tuple[Job, Exception]] = deque()  # from the decoder: the lists are the batching thread's
        self._changed = threading.Condition()
        self._stopping = False
        self._turn_started: float | None = None
        self._thread = threading.Thread(target=self._work, name="fluid-batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; background jobs wait for the others. Raises Closed after `close`."""
        with self._changed:
            if self._stopping:
                raise Closed
            job.remaining = job.count
            self._waiting[job.background].append(job)
            self._changed.notify()

    def close(self) -> None:
        """Take nothing new, finish what was taken, then free the model."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def healthy(self, stalled_seconds: float) -> bool:
        """The batching thread lives, and its present turn has not lasted longer than `stalled_seconds`.

        A decoder that hangs holds it up too: at the next images to decode, or when nothing else is left to do.
        """
        started = self._turn_started
        return self._thread.is_alive() and (started is None or time.monotonic() - started < stalled_seconds)

    def depth(self) -> tuple[int, int]:
        """(images waiting, images running)."""
        with self._changed:
            waiting = sum(job.count for jobs in self._waiting.values() for job in jobs) + len(self._starting)
            return waiting, len(self._running)

    # The batching thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._idle() and not self._stopping:
                    self._turn_started = None
                    self._changed.wait()
                if self._idle():
                    break
            self._turn_started = time.monotonic()
            self._drop_dead()
            self._admit()
            for group in self._groups():
                self._step(group)
            if self._idle():
                self._await_decoder()
        self._turn_started = None
        self._decoder.shutdown()
        del self.pipeline

    def _idle(self) -> bool:
        return not (self._running or self._starting or any(self._waiting.values()))

    def _drop_dead(self) -> None:
        """At a step boundary: forget jobs whose client left or whose deadline passed, wherever they are."""
        now = time.monotonic()
        with self._changed:
            jobs = {id(job): job for jobs in self._waiting.values() for job in jobs}
            jobs |= {id(job): job for job, _, _ in self._starting} | {id(r.job): r.job for r in self._running}
        for job in jobs.values():
            if job.cancelled or now > job.deadline:
                self._end(job, None if job.cancelled else Expired())
        self._end_failed()

    def _admit(self) -> None:
        """Fill the free places; images that start together go through the text aligner together."""
        from fluid_core.generation.engine import check_request

        free = self.max_batch_size - len(self._running)
        if free > 0 and self._worth_waiting(free):
            self._waited += 1
            return
        self._waited = 0
        chosen: dict[tuple[int, int], list[tuple[Job, int, GenerationRequest]]] = defaultdict(list)
        while free > 0:
            if self._starting:
                item = self._starting.popleft()
                chosen[tuple(item[2].grid)].append(item)  # type: ignore[index]
                free -= 1
                continue
            job = self._next_job()
            if job is None:
                break
            job.admitted = time.monotonic()
            try:
                requests = job.make_requests()
                assert len(requests) == job.count
                for request in requests:
                    check_request(self.pipeline.model, request)
            except Exception as error:
                self._end(job, error)
                continue
            self._starting.extend((job, index, request) for index, request in enumerate(requests))
        for items in chosen.values():
            self._start(items)

    def _worth_waiting(self, free: int) -> bool:
        waiting, _ = self.depth()
        patience = PATIENCE - self._waited
        return waiting >= free and any(len(r.slot.counts) - r.slot.step <= patience for r in self._running)

    def _start(self, items: list[tuple[Job, int, "GenerationRequest"]]) -> None:
        from fluid_core.generation.engine import start_batch

        try:
            slots = start_batch(self.pipeline.model, [request for _, _, request in items])
        except Exception as error:
            logger.exception("%d images could not be started", len(items))
            for job in {id(job): job for job, _, _ in items}.values():
                self._end(job, error)
            return
        self._running += [_Running(job, index, slot) for (job, index, _), slot in zip(items, slots, strict=True)]

    def _next_job(self) -> Job | None:
        with self._changed:
            for background in (False, True):
                if self._waiting[background]:
                    return self._waiting[background].popleft()
        return None

    def _groups(self) -> list[list[_Running]]:
        groups: dict[tuple[Any, ...], list[_Running]] = defaultdict(list)
        for running in self._running:
            groups[running.group].append(running)
        return list(groups.values())

    def _step(self, group: list[_Running]) -> None:
        from fluid_core.generation.engine import decode_step

        try:
            decode_step(self.pipeline.model, [running.slot for running in group])
            self.steps += 1
            self.last_batch = len(group)
            partial = [running for running in group if running.wants_preview]
            if partial:
                for running, image in zip(partial, self._decode(partial), strict=True):
                    if running.job.on_partial and not running.job.cancelled and isinstance(image, Image.Image):
                        running.job.on_partial(running.index, image, running.slot)
            # Last: what fails above ends the group's jobs, and the decoder must not end them too.
            done = [running for running in group if running.slot.done]
            if done:
                self._hand_over(done)
        except Exception as error:
            logger.exception("a batch of %d images failed", len(group))
            for job in {id(running.job): running.job for running in group}.values():
                self._end(job, error)

    def _hand_over(self, done: list[_Running]) -> None:
        """Free the places of finished images and have them decoded. One batch at a time: a slow decoder holds the steps up."""
        finished = {id(running) for running in done}
        self._running = [running for running in self._running if id(running) not in finished]
        self._await_decoder()
        self._decoding = self._decoder.submit(self._finish, done)

    def _await_decoder(self) -> None:
        if self._decoding is not None:
            self._decoding.result()
            self._decoding = None
        self._end_failed()

    def _end_failed(self) -> None:
        while self._failed:
            self._end(*self._failed.popleft())

    def _finish(self, done: list[_Running]) -> None:
        """On the decoding thread."""
        try:
            for running, image in zip(done, self._decode(done), strict=True):
                job = running.job
                self.images += 1
                if job.cancelled:
                    continue
                if isinstance(image, FloatingPointError):
                    self._failed.append((job, image))
                    continue
                job.on_image(running.index, image, running.slot)
                job.remaining -= 1
                if job.remaining == 0:
                    job.on_end(None)
        except Exception as error:
            logger.exception("a batch of %d images could not be decoded", len(done))
            self._failed.extend((job, error) for job in {id(r.job): r.job for r in done if r.job.remaining}.values())

    def _decode(self, running: list[_Running]) -> list[Image.Image | FloatingPointError]:
        """The images; in place of one that came out NaN, by settings that a client may try, its error. The others are whole."""
        grid = running[0].slot.request.grid
        try:
            with torch.inference_mode():
                return list(self.pipeline.decode([r.slot.tokens_NC for r in running], grid))
        except FloatingPointError as error:
            return [error] if len(running) == 1 else [self._decode([one])[0] for one in running]

    def _end(self, job: Job, error: BaseException | None) -> None:
        """Take every trace of a job out; tell its owner unless it is the owner who left."""
        with self._changed:
            for jobs in self._waiting.values():
                if job in jobs:
                    jobs.remove(job)
            self._starting = deque(item for item in self._starting if item[0] is not job)
            self._running = [running for running in self._running if running.job is not job]
        if not job.cancelled:
            job.on_end(error)
        job.cancelled = True


def known_cells(slot: "DecodeSlot") -> list[bool]:
    """Row-major: which tokens of the image are decided."""
    return slot.known_N.reshape(-1).tolist()
