"""The driver of an encoding run: plan, settle what is left to do, run the Ray Data graph over it, finish the manifest."""

import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.parquet as pq
from tqdm import tqdm

from fluid_core.config import EncodeConfig
from fluid_core.data.plan import PlannedShard, make_plan, plan_table, read_plan
from fluid_core.data.storage import Storage, absolute, open_storage
from fluid_core.encoding.duplicates import find_duplicates
from fluid_core.encoding.ledger import Ledger
from fluid_core.encoding.manifest import build_manifest, read_null_text
from fluid_core.encoding.progress import EncodingProgress
from fluid_core.encoding.settings import EncodeSettings
from fluid_core.entry import keep_freed_memory
from fluid_core.latents.manifest import Manifest

LOOK_SECONDS = 10.0  # how often the driver asks the committers for failures
SETTLE_SECONDS = 30.0
PASSES = 3
"""A shard whose storage fails for a while gets this many chances in one run."""


@dataclass
class Output:
    """One data set to be made: train or validation."""

    sources: list[str]
    root: str
    plan: list[PlannedShard]
    storage: Storage

    def pending(self) -> list[PlannedShard]:
        done = Ledger(self.storage).ids()
        return [shard for shard in self.plan if not shard.duplicate_of and shard.id not in done]


@dataclass
class Throughput:
    """What this run did; the manifest does not hold it, because it is not a function of the data."""

    samples: int = 0
    seconds: float = 0.0
    warm_samples: int = 0
    warm_seconds: float = 0.0
    """After the first chunk came out: without the start of the workers and the loading of the encoders."""

    @property
    def images_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, float]:
        warm = self.warm_samples / self.warm_seconds if self.warm_seconds else 0.0
        return {**asdict(self), "images_per_second": self.images_per_second, "warm_images_per_second": warm}


def prepare_output(sources: list[str], root: str, settings: EncodeSettings, force: bool) -> Output:
    """Plan an output, and check that what lies there already was made with the same settings.

    Raises:
        ValueError: bad sources, or an output of other settings.
    """
    storage = open_storage(root)
    if force:
        _clear(storage)
    before = storage.read_or_none("plan.parquet")
    with tqdm(total=0, desc="hashing shards", unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        plan = make_plan(sources, settings.max_shard_samples, read_plan(before) if before else (), progress)
    for shard in plan:
        if shard.duplicate_of:
            print(f"refused: {shard.uri} has the same bytes as {shard.duplicate_of}", file=sys.stderr)
    if not claim(storage, settings):
        before = None
    buffer = io.BytesIO()
    pq.write_table(plan_table(plan), buffer, compression="zstd")
    if buffer.getvalue() != before:
        storage.put_bytes(buffer.getvalue(), "plan.parquet", overwrite=True)
    return Output(sources, root, plan, storage)


def claim(storage: Storage, settings: EncodeSettings) -> bool:
    """Write down the settings where there are none. False when files of other settings, none of them committed, had to go.

    Raises:
        ValueError: something is committed with other settings.
    """
    fingerprint = settings.fingerprint()
    wanted = (json.dumps({"settings": fingerprint, "hash": settings.hash}, indent=1, sort_keys=True) + "\n").encode()
    # Of two encoders that start at once, one writes and both read the same.
    storage.put_bytes(wanted, SETTINGS, overwrite=False)
    there = json.loads(storage.read_or_none(SETTINGS) or wanted)
    if there["hash"] == settings.hash:
        return True
    if Ledger(storage).ids():
        changed = sorted(name for name in fingerprint if fingerprint[name] != there["settings"].get(name))
        raise ValueError(
            f"{storage.root} holds a data set made with other settings ({', '.join(changed)} differ): "
            "name another encode.output, or --force to encode it anew"
        )
    _clear(storage)
    storage.put_bytes(wanted, SETTINGS, overwrite=True)
    return False


def _clear(storage: Storage) -> None:
    for stored in list(storage.list()):
        if stored.name.split("/")[0] in OWN_NAMES:
            storage.delete(stored.name)


SETTINGS = "_settings.json"
OWN_NAMES = {
    "manifest.json", "plan.parquet", SETTINGS, "_null_text.json", "_throughput.json", "_ledger", "latents", "text",
    "quarantine", "_duplicates",
}  # fmt: skip


def encode_outputs(
    outputs: Sequence[Output], settings: EncodeSettings, config: EncodeConfig
) -> tuple[list[Manifest], Throughput]:
    """Encode what is missing in all outputs with one Ray Data graph, then write their manifests.

    Needs a connected Ray (fluid_core.entry.ray_session) when something is missing.

    Raises:
        ValueError, PermissionError, ConnectionError: what stopped the run; shards that were committed stay committed.
    """
    throughput = Throughput()
    failures: dict[str, str] = {}
    for _ in range(PASSES):
        work = [(output, shard) for output in outputs for shard in output.pending()]
        if not work:
            break
        if settings.filters.deduplicate:
            for output in outputs:
                find_duplicates(output.storage, output.plan, settings, config)
        failures = _run_graph(work, settings, config, throughput)
    left = [shard.uri for output in outputs for shard in output.pending()]
    if left:
        reason = next(iter(failures.values()), "their workers did not finish")
        raise ConnectionError(f"{len(left)} shards are not encoded, the first is {left[0]}: {reason}")
    if throughput.samples:
        speed = (json.dumps(throughput.as_json()) + "\n").encode()
        for output in outputs:
            output.storage.put_bytes(speed, "_throughput.json", overwrite=True)
    return [finish_output(output, settings) for output in outputs], throughput


def finish_output(output: Output, settings: EncodeSettings) -> Manifest:
    """Write `manifest.json` from the ledger; removes the scratch folder."""
    shards = [shard for shard in output.plan if not shard.duplicate_of]
    records = []
    for shard, record in zip(shards, Ledger(output.storage).read_all([shard.id for shard in shards]), strict=True):
        assert record is not None, f"no ledger record of {shard.id}"
        if record.settings_hash != settings.hash:
            raise ValueError(
                f"{output.root}: shard {shard.id} was committed with other settings; --force encodes everything anew"
            )
        records.append(record)
    manifest = build_manifest(settings, output.plan, records, read_null_text(output.storage))
    data = manifest.dumps().encode()
    if output.storage.read_or_none("manifest.json") != data:
        output.storage.put_bytes(data, "manifest.json", overwrite=True)
    output.storage.clean_scratch()
    return manifest


def _run_graph(
    work: list[tuple[Output, PlannedShard]], settings: EncodeSettings, config: EncodeConfig, throughput: Throughput
) -> dict[str, str]:
    """One pass. Returns the shards that failed for reasons that may pass: {id: message}."""
    import ray

    from fluid_core.encoding.committer import Committer

    settings = replace(settings, threads=settings.threads or max(1, (os.cpu_count() or 1) // config.encode_workers))
    _require_resources(config)
    _quiet_ray_data()
    # A committer that dies comes back empty: its open shards are encoded again in the next pass.
    committer_class = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(Committer)
    committers = [committer_class.remote(settings) for _ in range(config.commit_workers)]
    failures: dict[str, dict[str, str]] = {}
    started = time.monotonic()
    try:
        with EncodingProgress([absolute(output.root) for output, _ in work]) as progress:
            samples = delivered = 0
            first: tuple[int, float] | None = None
            looked = started
            for report in _reports(work, settings, config, committers):
                failure = report["failure"]
                if failure is not None:
                    failures[report["shard"]] = failure
                else:
                    delivered += 1
                if time.monotonic() - looked > LOOK_SECONDS:
                    failures.update(_failures(committers))
                    looked = time.monotonic()
                if any(failure["kind"] == "fatal" for failure in failures.values()):
                    break
                images = report["done"] + report["dropped"]
                samples += images
                progress.count(report["output"], images, report["bad"], last=report["last"] and failure is None)
                first = first or (samples, time.monotonic())
            else:
                _settle(committers, delivered)
            failures.update(_failures(committers))
            throughput.samples += samples
            if first is not None:
                throughput.warm_samples += samples - first[0]
                throughput.warm_seconds += time.monotonic() - first[1]
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):  # raised by our own code: its traceback tells where
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConnectionError(
            f"Ray lost workers of the encoding ({type(error).__name__}: {reason}): what was committed stays, the same command goes "
            "on; if they ran out of memory, lower encode.decode_workers, encode.encode_workers or encode.batch_size"
        ) from error
    finally:
        throughput.seconds += time.monotonic() - started
        _release(committers)
    for failure in failures.values():
        if failure["kind"] == "fatal":
            raise ValueError(failure["message"])
    return {shard: failure["message"] for shard, failure in failures.items()}


def _reports(
    work: list[tuple[Output, PlannedShard]], settings: EncodeSettings, config: EncodeConfig, committers: list[Any]
) -> Iterator[dict[str, Any]]:
    """The graph: shards -> read, filter, decode (tasks) -> VAE and T5 (a fixed pool of actors) -> reports."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    from fluid_core.encoding.encode import Encode
    from fluid_core.encoding.read_decode import ReadDecode

    on_cpu = {"num_cpus": _cpus_per_encoder(config), "runtime_env": {"env_vars": keep_freed_memory()}}
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = settings.chunk_samples * 3 * settings.image_size**2
    items = [{"work": json.dumps(_work_item(output, shard))} for output, shard in work]
    roots = sorted({absolute(output.root) for output, _ in work})
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    decoded = dataset.map_batches(
        ReadDecode(settings).__call__,
        batch_size=1,
        compute=TaskPoolStrategy(size=config.decode_workers),
        num_cpus=1,
        memory=config.decode_memory_mib << 20,
    )
    encoded = decoded.map_batches(
        Encode,
        fn_constructor_kwargs={"settings": settings, "committers": committers, "outputs": roots},
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(size=config.encode_workers),
        memory=config.encode_memory_mib << 20,
        **({"num_cpus": 0, "num_gpus": config.gpus_per_worker} if config.gpus_per_worker else on_cpu),
    )
    for row in encoded.iter_rows():
        yield json.loads(row["report"])


def _cpus_per_encoder(config: EncodeConfig) -> float:
    """What Ray reserves for an encode worker on CPU: a share of what the decode workers, which need little beside it, leave."""
    import ray

    left = ray.cluster_resources().get("CPU", 0) - config.decode_workers
    return min(1.0, int(100 * left / config.encode_workers) / 100)


def _work_item(output: Output, shard: PlannedShard) -> dict[str, Any]:
    # Workers have another working directory than the driver.
    return {"shard": asdict(replace(shard, root=absolute(shard.root))), "output": absolute(output.root)}


def _require_resources(config: EncodeConfig) -> None:
    """One line before work starts, where Ray would wait for ever."""
    import ray

    resources = ray.cluster_resources()
    cpus = config.decode_workers + (not config.gpus_per_worker)
    if resources.get("CPU", 0) < cpus:
        raise ValueError(
            f"encode.decode_workers and the encoders need {cpus} CPUs, Ray has {resources.get('CPU', 0):.0f}: lower decode_workers"
        )
    if resources.get("GPU", 0) < config.gpus_per_worker * config.encode_workers:
        raise ValueError(
            f"encode wants {config.gpus_per_worker * config.encode_workers} GPUs, Ray has {resources.get('GPU', 0):.0f}"
        )
    need = (config.decode_workers * config.decode_memory_mib + config.encode_workers * config.encode_memory_mib) << 20
    if resources.get("memory", 0) < need:
        raise ValueError(
            f"encode reserves {need >> 20} MiB, Ray has {int(resources.get('memory', 0)) >> 20}: "
            "lower encode.decode_memory_mib or encode.encode_memory_mib"
        )


def _failures(committers: list[Any]) -> dict[str, dict[str, str]]:
    """What the committers could not write: {shard id: failure}. A committer that is being restarted says nothing."""
    import ray

    found: dict[str, dict[str, str]] = {}
    for committer in committers:
        try:
            found.update(ray.get(committer.state.remote(), timeout=LOOK_SECONDS)[1])
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
            continue
    return found


def _settle(committers: list[Any], delivered: int) -> None:
    """Wait until the chunks that are under way have arrived; a committer that died took its count along, so not for ever."""
    import ray

    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        try:
            states = ray.get([committer.state.remote() for committer in committers], timeout=SETTLE_SECONDS)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
            return
        if sum(taken for taken, _ in states) >= delivered:
            return
        time.sleep(0.05)


def _release(committers: list[Any]) -> None:
    import ray

    try:
        ray.get([committer.discard.remote() for committer in committers], timeout=30)
    except (
        Exception
    ):  # the actor or the whole of Ray is gone; its scratch files lie in a folder that the end of the run removes
        logging.getLogger(__name__).debug("a committer did not answer", exc_info=True)
    for committer in committers:
        ray.kill(committer)


def _quiet_ray_data() -> None:
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
