"""What must hold when things go wrong around the server: crashes, overload, deadlines, clients that leave, new versions."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from serving_support import Server, difference, image_of, metric, open_request, request, small_recipe
from tiny_fluid import tiny_pipeline

from fluid_core.registry.model_registry import ModelRegistry
from fluid_core.registry.models import CHAMPION
from fluid_core.serving.keys import new_key

QUEUE = 12
PATH = "/v1/images/generations"


class Faulty(Server):
    """A server with keys, a short queue, and a champion that the tests move."""

    registry: ModelRegistry
    key: str
    other_key: str

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def ask(self, **body: Any) -> tuple[int, dict[str, str], dict[str, Any]]:
        status, headers, data = request(self, PATH, {"prompt": "a red circle", **body}, headers=self.auth)
        return status, headers, json.loads(data)


@pytest.fixture(scope="module")
def server(ray_session: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    from fluid_core.serving.app import serving

    folder = tmp_path_factory.mktemp("faults")
    key, other = new_key("ann", folder / "keys"), new_key("bob", folder / "keys")
    recipe = small_recipe(
        folder,
        max_batch_size=4,
        max_queued=QUEUE,
        deadline_seconds=200,
        drain_seconds=200,
        follow_alias_seconds=0.5,
        api_keys_file=str(folder / "keys"),
    )
    registry = ModelRegistry(recipe.registry)
    registry.ensure("unit")
    for seed in (0, 1):
        pipeline = tiny_pipeline(folder / f"made{seed}", seed)
        pipeline.save_pretrained(folder / f"bundle{seed}")
        registry.client.create_model_version("unit", source=str(folder / f"bundle{seed}"))
    registry.client.set_registered_model_alias("unit", CHAMPION, "1")
    with serving(recipe) as (url, ref):
        assert ref.label == "unit:1"
        server = Faulty(url, recipe, tiny_pipeline(folder / "again", 0), folder)
        server.registry, server.key, server.other_key = registry, key, other
        yield server


def replicas(name: str) -> list[psutil.Process]:
    """The worker processes of a deployment of this test session's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ServeReplica:fluid:{name}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def settled(server: Faulty, seconds: float = 60) -> bool:
    """True when no image is in flight any more."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if metric(server, "fluid_images_in_flight") == 0:
            return True
        time.sleep(0.1)
    return False


def test_keys_guard_everything_and_tell_owners_apart(server: Faulty) -> None:
    for path in ("/v1/models", "/v1/files", "/v1/batches", "/v1/models/unit"):
        assert request(server, path)[0] == 401
    for headers in ({}, {"Authorization": "Bearer sk-fluid-wrong"}, {"Authorization": server.key}):
        assert request(server, PATH, {"prompt": "a circle"}, headers=headers)[0] == 401
    assert server.ask(steps=1)[0] == 200
    _, _, data = request(
        server, "/v1/files", form={"purpose": "batch"}, files={"file": ("f.jsonl", b"{}\n")}, headers=server.auth
    )
    file_id = json.loads(data)["id"]
    bob = {"Authorization": f"Bearer {server.other_key}"}
    assert request(server, f"/v1/files/{file_id}", headers=server.auth)[0] == 200
    assert request(server, f"/v1/files/{file_id}", headers=bob)[0] == 404
    assert request(server, f"/v1/files/{file_id}/content", headers=bob)[0] == 404


def test_ten_times_the_capacity_is_refused_in_order_and_nothing_is_lost(server: Faulty) -> None:
    """For a minute. Everyone is answered, what was accepted is finished, memory stays bounded."""
    seconds = 60.0
    clients = 10 * QUEUE
    limits = httpx.Limits(max_connections=clients)

    async def flood() -> list[tuple[int, httpx.Response]]:
        until = time.monotonic() + seconds

        async def one(client: httpx.AsyncClient, number: int) -> list[tuple[int, httpx.Response]]:
            answers = []
            while not answers or time.monotonic() < until:
                body = {"prompt": "a red circle", "seed": number, "steps": 8}
                answers.append((number, await client.post(server.url + PATH, json=body)))
            return answers

        async with httpx.AsyncClient(timeout=300, limits=limits, headers=server.auth) as client:
            found = await asyncio.gather(*(one(client, number) for number in range(clients)))
        return [answer for answers in found for answer in answers]

    images, memory = metric(server, "fluid_images_total"), [resident()]
    with ThreadPoolExecutor(1) as pool:
        flooded = pool.submit(asyncio.run, flood())
        while not flooded.done():
            time.sleep(1)
            memory.append(resident())
        answers = flooded.result()
    statuses = Counter(answer.status_code for _, answer in answers)
    assert set(statuses) == {200, 429} and statuses[200] >= QUEUE
    for number, answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1 and answer.json()["error"]["code"] == "overloaded"
        else:
            assert answer.json()["data"][0]["seed"] == number
    assert settled(server)
    assert metric(server, "fluid_images_total") == images + statuses[200]
    # The queue and its connections cost memory once; what a longer load adds would be a leak.
    assert max(memory) - memory[0] < 200 * 2**20, [size >> 20 for size in memory]
    assert max(memory[-3:]) - memory[len(memory) // 3] < 40 * 2**20, [size >> 20 for size in memory]
    assert server.ask(steps=1)[0] == 200


def resident() -> int:
    """Bytes of the gateway's and the generator's processes."""
    return sum(process.memory_info().rss for name in ("Gateway", "Generator") for process in replicas(name))


def test_a_late_request_ends_with_504(server: Faulty) -> None:
    status, headers, body = server.ask(steps=64, size="128x128", n=8, deadline=0.5)
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded") and "retry-after" in headers
    assert settled(server)


def test_work_stops_when_the_client_goes_away(server: Faulty) -> None:
    for stream in (False, True):
        before = metric(server, "fluid_cancelled_total")
        body = {"prompt": "a red circle", "steps": 256, "size": "128x128", "n": 8, "stream": stream}
        connection = open_request(server, PATH, body, {"Authorization": f"Bearer {server.key}"})
        until = time.monotonic() + 60
        while metric(server, "fluid_images_in_flight") == 0 and time.monotonic() < until:
            time.sleep(0.02)
        connection.close()
        assert settled(server), "the images of a client that left were not dropped"
        assert metric(server, "fluid_cancelled_total") == before + 1


def test_a_request_survives_the_death_of_its_replica(server: Faulty) -> None:
    victims = replicas("Generator")
    assert len(victims) == 1
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(server.ask, seed=i, steps=16, n=3) for i in range(4)]
        until = time.monotonic() + 60
        while metric(server, "fluid_images_in_flight") == 0 and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(victims[0].pid, signal.SIGKILL)
        answers = [job.result() for job in jobs]
    for i, (status, _, body) in enumerate(answers):
        assert status == 200, body
        expected = server.pipeline(["a red circle"] * 3, seed=i, num_steps=16)
        images = [image_of(item["b64_json"]) for item in body["data"]]
        assert all(difference(a, b) <= 1 for a, b in zip(images, expected, strict=True))
    assert victims[0].pid not in [process.pid for process in replicas("Generator")]
    assert settled(server)


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_stream_survives_one_death_of_its_replica_and_says_so_at_the_second(server: Faulty, deaths: int) -> None:
    body = {"prompt": "a red circle", "seed": 5, "steps": 48, "size": "128x128", "stream": True, "partial_images": 3}
    events: list[dict[str, Any]] = []
    killed: list[int] = []
    with httpx.stream("POST", server.url + PATH, json=body, headers=server.auth, timeout=180) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            events.append(json.loads(line.removeprefix("data: ")))
            now = [process.pid for process in replicas("Generator") if process.pid not in killed]
            if "partial_image" in events[-1].get("type", "") and len(killed) < deaths and now:
                os.kill(now[0], signal.SIGKILL)
                killed.append(now[0])
    assert len(killed) == deaths
    if deaths == 1:
        assert events[-1]["type"] == "image_generation.completed"
        expected = server.pipeline(["a red circle"], seed=5, num_steps=48, size=128)[0]
        assert difference(image_of(events[-1]["b64_json"]), expected) <= 1
    else:
        assert events[-1]["error"]["code"] == "replica_lost"
    assert settled(server)


def test_a_batch_survives_the_death_of_the_gateway_and_of_its_replica(server: Faulty) -> None:
    lines = [
        {"custom_id": str(i), "method": "POST", "url": PATH, "body": {"prompt": "a red circle", "steps": 4}} for i in range(300)
    ]
    data = "\n".join(json.dumps(line) for line in lines).encode()
    _, _, made = request(server, "/v1/files", form={"purpose": "batch"}, files={"file": ("f", data)}, headers=server.auth)
    body = {"input_file_id": json.loads(made)["id"], "endpoint": PATH, "completion_window": "24h"}
    batch = json.loads(request(server, "/v1/batches", body, headers=server.auth)[2])

    def look() -> dict[str, Any]:
        while True:
            try:
                status, _, data = request(server, f"/v1/batches/{batch['id']}", headers=server.auth)
                if status == 200:
                    return json.loads(data)
            except httpx.HTTPError:
                pass
            time.sleep(0.2)

    while look()["request_counts"]["completed"] < 40:
        time.sleep(0.05)
    os.kill(replicas("Gateway")[0].pid, signal.SIGKILL)
    while look()["request_counts"]["completed"] < 120:
        time.sleep(0.05)
    os.kill(replicas("Generator")[0].pid, signal.SIGKILL)
    until = time.monotonic() + 180
    while (now := look())["status"] != "completed" and time.monotonic() < until:
        time.sleep(0.3)
    assert now["request_counts"] == {"total": 300, "completed": 300, "failed": 0}
    _, _, output = request(server, f"/v1/files/{now['output_file_id']}/content", headers=server.auth)
    assert [json.loads(line)["custom_id"] for line in output.splitlines()] == [str(i) for i in range(300)]


def traffic(server: Faulty, during: Any) -> list[tuple[int, dict[str, str], dict[str, Any]]]:
    """Answers of three clients that ask without pause while `during` runs, and for a moment after."""
    stop = [False]

    def client(number: int) -> list[tuple[int, dict[str, str], dict[str, Any]]]:
        answers = []
        while not stop[0]:
            answers.append(server.ask(seed=number, steps=8))
        return answers

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client, number) for number in range(3)]
        try:
            during()
            time.sleep(0.5)
        finally:
            stop[0] = True
        return [answer for client in clients for answer in client.result()]


def wait_for_model(server: Faulty, label: str) -> None:
    until = time.monotonic() + 60
    while server.ask(steps=1)[2].get("model") != label:
        assert time.monotonic() < until, f"{label} is not served"
        time.sleep(0.1)


def test_a_moved_alias_changes_the_model_under_load(server: Faulty) -> None:
    def move() -> None:
        server.registry.client.set_registered_model_alias("unit", CHAMPION, "2")
        wait_for_model(server, "unit:2")

    answers = traffic(server, move)
    assert {status for status, _, _ in answers} == {200}
    models = Counter(body["model"] for _, _, body in answers)
    assert set(models) == {"unit:1", "unit:2"}, models
    second = tiny_pipeline(server.folder / "second", 1)
    expected = {"unit:1": server.pipeline, "unit:2": second}
    # A name that is pinned to the version that went is refused, not made by the other.
    status, _, body = server.ask(steps=1, model="unit:1")
    assert status == 404 and body["error"]["code"] == "model_not_found"
    seen: set[tuple[str, int]] = set()
    for _, _, body in answers:
        seed = body["data"][0]["seed"]
        if (body["model"], seed) not in seen:
            seen.add((body["model"], seed))
            image = expected[body["model"]](["a red circle"], seed=seed, num_steps=8)[0]
            assert difference(image_of(body["data"][0]["b64_json"]), image) <= 1


def test_a_version_that_cannot_be_loaded_changes_nothing(server: Faulty, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    broken = server.registry.client.create_model_version("unit", source=str(tmp_path))
    server.registry.client.set_registered_model_alias("unit", CHAMPION, str(broken.version))
    until = time.monotonic() + 3
    while time.monotonic() < until:
        assert server.ask(steps=1)[2]["model"] == "unit:2"
    server.registry.client.set_registered_model_alias("unit", CHAMPION, "1")
    wait_for_model(server, "unit:1")


def test_a_redeploy_drains_without_failed_requests(server: Faulty, repository: Path) -> None:
    """By the config file of `serve deploy`, as Ray's dashboard hands it to Serve."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    values = yaml.safe_load((repository / "infra/serve/demo.yaml").read_text())
    values["applications"][0]["args"] = {
        "config": str(server.folder / "recipe.yaml"),
        "overrides": ["serving.max_batch_size=3"],
    }
    config = ServeDeploySchema.model_validate(values)
    before = {name: {process.pid for process in replicas(name)} for name in ("Gateway", "Generator")}

    def redeploy() -> None:
        _get_global_client().deploy_apps(config)  # its own wait for the replicas ends after a minute, also on a busy machine
        until = time.monotonic() + 300
        for name, pids in before.items():
            while not (now := {process.pid for process in replicas(name)}) or now & pids:
                assert time.monotonic() < until, f"{name} was not replaced"
                time.sleep(0.2)

    answers = traffic(server, redeploy)
    assert Counter(status for status, _, _ in answers) == {200: len(answers)} and len(answers) > 3
