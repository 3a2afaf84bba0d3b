"""Continuous batching: images join, leave, are dropped, and come out as if they were alone."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_fluid import tiny_pipeline

from fluid_core.generation.pipeline import FluidPipeline
from fluid_core.serving.batching import Closed, ContinuousBatcher, Expired, Job, known_cells


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> FluidPipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


class Client:
    """Collects what a job reports."""

    def __init__(self, pipeline: FluidPipeline, prompts: list[str], seed: int = 0, **settings: object):
        requests = {name: settings.pop(name) for name in ("num_steps", "guidance_scale", "size") if name in settings}
        self.images: dict[int, Image.Image] = {}
        self.partials: list[tuple[int, int, list[bool]]] = []
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self.first = threading.Event()

        def on_end(error: BaseException | None) -> None:
            assert not self.ended.is_set()
            self.error = error
            self.ended.set()

        def on_partial(index: int, image: Image.Image, slot: object) -> None:
            self.partials.append((index, slot.step, known_cells(slot)))  # type: ignore[attr-defined, arg-type]
            self.first.set()

        self.job = Job(
            count=len(prompts),
            make_requests=lambda: pipeline.requests(prompts, seed=seed, **requests),  # type: ignore[arg-type]
            on_image=lambda index, image, slot: self.images.__setitem__(index, image),
            on_partial=on_partial,
            on_end=on_end,
            **settings,  # type: ignore[arg-type]
        )

    def wait(self) -> "Client":
        assert self.ended.wait(60)
        return self


def same(a: Image.Image, b: Image.Image) -> bool:
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) <= 1


def test_images_are_the_same_alone_and_in_changing_company(pipeline: FluidPipeline) -> None:
    batcher = ContinuousBatcher(pipeline, max_batch_size=3)
    clients = [
        Client(pipeline, ["a red circle", "a blue square"], seed=1),
        Client(pipeline, ["three apple"], seed=7, num_steps=3),
        Client(pipeline, ["a green circle"], seed=9, guidance_scale=1.0),
        Client(pipeline, ["two square", "a apple", "the circle", "a red square"], seed=20, num_steps=11),
        Client(pipeline, ["a red circle"], seed=3, size=(48, 32)),
    ]
    for client in clients:
        batcher.submit(client.job)
    for client in clients:
        assert client.wait().error is None
    batcher.close()
    assert batcher.join(10)
    expected = [
        pipeline(["a red circle", "a blue square"], seed=1),
        pipeline(["three apple"], seed=7, num_steps=3),
        pipeline(["a green circle"], seed=9, guidance_scale=1.0),
        pipeline(["two square", "a apple", "the circle", "a red square"], seed=20, num_steps=11),
        pipeline(["a red circle"], seed=3, size=(48, 32)),
    ]
    for client, images in zip(clients, expected, strict=True):
        assert len(client.images) == len(images)
        assert all(same(client.images[i], image) for i, image in enumerate(images))
    # Nine images in places for three: more steps than one batch of all, fewer than one after the other.
    assert 11 < batcher.steps < 2 * 6 + 3 + 6 + 4 * 11 + 6


def test_an_image_joins_a_running_batch(pipeline: FluidPipeline) -> None:
    batcher = ContinuousBatcher(pipeline, max_batch_size=4)
    long = Client(pipeline, ["a red circle"], num_steps=16, partial_images=15)
    batcher.submit(long.job)
    assert long.first.wait(30)
    short = Client(pipeline, ["a blue circle"], num_steps=1)
    batcher.submit(short.job)
    short.wait()
    assert not long.ended.is_set()
    long.wait()
    assert [step for _, step, _ in long.partials] == list(range(1, 16))
    counts = [sum(known) for _, _, known in long.partials]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 15
    batcher.close()


def test_under_load_images_fall_into_step(pipeline: FluidPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight places always wanted, each freed at a step of its own: they would stay apart for ever."""
    batcher, together = ContinuousBatcher(pipeline, max_batch_size=8), []
    plain = batcher._hand_over
    monkeypatch.setattr(batcher, "_hand_over", lambda done: (together.append(len(done)), plain(done)))
    gate = threading.Event()
    clients = [Client(pipeline, ["a red circle"], seed=i, num_steps=4 + i if i < 8 else 12) for i in range(48)]
    made = clients[0].job.make_requests
    clients[0].job.make_requests = lambda: (gate.wait(60), made())[1]
    for client in clients:
        batcher.submit(client.job)
    gate.set()
    for client in clients:
        assert client.wait().error is None
    assert sum(together[:6]) <= 8 and sum(together[-3:]) >= 8, together
    batcher.close()


@pytest.mark.parametrize("waiting,starts", [(7, [(1, 0), (4, 4), (3, 8)]), (2, [(1, 0), (2, 2)])])
def test_free_places_wait_for_others_only_under_load(
    waiting: int, starts: list[tuple[int, int]], pipeline: FluidPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image has two of four steps to go. When seven come, the three free places wait for its place; two join at once.

    `starts`: (images that start together, steps made before)."""
    batcher, started = ContinuousBatcher(pipeline, max_batch_size=4), []
    plain = batcher._start
    monkeypatch.setattr(batcher, "_start", lambda items: (started.append((len(items), batcher.steps)), plain(items)))
    others = [Client(pipeline, ["a blue circle"], seed=i, num_steps=4) for i in range(waiting)]
    first = Client(pipeline, ["a red circle"], num_steps=4, partial_images=1)
    report = first.job.on_partial

    def on_partial(*args: object) -> None:  # on the batching thread, so between two steps
        report(*args)  # type: ignore[misc, arg-type]
        for other in others:
            batcher.submit(other.job)

    first.job.on_partial = on_partial
    batcher.submit(first.job)
    for client in (first, *others):
        assert client.wait().error is None
    assert started == starts
    batcher.close()


def test_bad_requests_deadlines_and_cancellation_touch_nobody_else(pipeline: FluidPipeline) -> None:
    batcher = ContinuousBatcher(pipeline, max_batch_size=2)
    neighbour = Client(pipeline, ["a red circle"], num_steps=16, partial_images=15)
    batcher.submit(neighbour.job)
    assert neighbour.first.wait(30)
    wrong = Client(pipeline, ["a red circle"], num_steps=99)
    late = Client(pipeline, ["a red circle"], deadline=time.monotonic() - 1)
    gone = Client(pipeline, ["a red circle"] * 5)
    gone.job.cancel()
    for client in (wrong, late, gone):
        batcher.submit(client.job)
    assert isinstance(wrong.wait().error, ValueError) and "num_steps" in str(wrong.error)
    assert isinstance(late.wait().error, Expired)
    assert neighbour.wait().error is None
    assert same(neighbour.images[0], pipeline(["a red circle"], num_steps=16)[0])
    batcher.close()
    assert batcher.join(10)
    assert not gone.ended.is_set() and not gone.images
    with pytest.raises(Closed):
        batcher.submit(wrong.job)


def test_interactive_jobs_go_before_background_jobs(pipeline: FluidPipeline) -> None:
    batcher = ContinuousBatcher(pipeline, max_batch_size=1)
    order: list[str] = []
    first = Client(pipeline, ["a red circle"], num_steps=16, partial_images=15)
    batcher.submit(first.job)
    assert first.first.wait(30)
    clients = []
    for name, background in (("background", True), ("interactive", False)):
        client = Client(pipeline, ["a apple"], background=background)
        client.job.on_image = lambda *_, name=name: order.append(name)
        clients.append(client)
        batcher.submit(client.job)
    for client in clients:
        client.wait()
    assert order == ["interactive", "background"]
    batcher.close()


def test_a_failing_batch_is_reported_and_the_next_works(pipeline: FluidPipeline, tmp_path: Path) -> None:
    broken = tiny_pipeline(tmp_path)
    batcher = ContinuousBatcher(broken, max_batch_size=2)
    kept = broken.latent_mean
    broken.latent_mean = [float("nan")] * 4
    client = Client(broken, ["a red circle"])
    batcher.submit(client.job)
    assert isinstance(client.wait().error, FloatingPointError)
    broken.latent_mean = kept
    client = Client(broken, ["a red circle"])
    batcher.submit(client.job)
    assert client.wait().error is None and batcher.healthy(60)
    batcher.close()


def test_an_image_that_comes_out_nan_spoils_no_other(pipeline: FluidPipeline) -> None:
    batcher = ContinuousBatcher(pipeline, max_batch_size=8)
    gate = threading.Event()
    first = Client(pipeline, ["the circle"])
    made = first.job.make_requests
    first.job.make_requests = lambda: (gate.wait(60), made())[1]
    neighbour, broken = Client(pipeline, ["a red circle"], seed=4), Client(pipeline, ["two apple"] * 2, guidance_scale=1e38)
    for client in (first, broken, neighbour):
        batcher.submit(client.job)
    gate.set()  # all three are decoded together
    assert isinstance(broken.wait().error, FloatingPointError) and not broken.images
    assert neighbour.wait().error is None and first.wait().error is None
    assert same(neighbour.images[0], pipeline(["a red circle"], seed=4)[0])
    batcher.close()
    assert batcher.join(10) and batcher.steps == 6


def test_places_are_used_again_while_their_images_are_decoded(pipeline: FluidPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """One place; the decoder stands still: the second image takes all its steps, the third none before the decoder is free."""
    batcher = ContinuousBatcher(pipeline, max_batch_size=1)
    gate, decode = threading.Event(), pipeline.decode
    monkeypatch.setattr(pipeline, "decode", lambda *arguments: (gate.wait(60), decode(*arguments))[1])
    clients = [Client(pipeline, ["a red circle"], seed=seed, num_steps=4) for seed in range(3)]
    for client in clients:
        batcher.submit(client.job)
    until = time.monotonic() + 60
    while batcher.steps < 8:
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.3)
    assert batcher.steps == 8 and not batcher.healthy(0.2) and not clients[0].ended.is_set()
    gate.set()
    for seed, client in enumerate(clients):
        assert client.wait().error is None
        assert same(client.images[0], pipeline(["a red circle"], seed=seed, num_steps=4)[0])
    batcher.close()
    assert batcher.join(10)


def test_a_decoder_that_fails_ends_its_images_and_no_others(pipeline: FluidPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job whose first image fails has another still on its way: it ends once, with the error."""
    batcher = ContinuousBatcher(pipeline, max_batch_size=1)
    decode, calls = pipeline.decode, []

    def failing(*arguments: object) -> list[Image.Image]:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "decode", failing)
    broken, other = Client(pipeline, ["two apple"] * 2), Client(pipeline, ["a red circle"])
    for client in (broken, other):
        batcher.submit(client.job)
    assert isinstance(broken.wait().error, RuntimeError) and not broken.images
    assert other.wait().error is None and same(other.images[0], pipeline(["a red circle"])[0])
    batcher.close()
    assert batcher.join(10)
