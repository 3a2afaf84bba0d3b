"""`training.loader: ray_data`: Ray Data streams the rows, in place of the Parquet reader of loader.py.

The driver makes a dataset of row groups, which Ray's tasks read on any node; Ray Train splits the stream among the workers; a
worker shuffles within a buffer and hands batches to the same Collator. Rows are told apart from samples as in loader.py: what
is random about a sample is drawn from (seed, global position).

Which row stands at a position depends on how the stream was split, so a resume is exact only at the world size and the
micro-batch size that the run began with, and it reads the rows of the epoch up to its position again.
"""

from collections.abc import Generator, Iterator
from typing import Any

import pyarrow as pa
import torch

from fluid_core.latents.reader import EncodedDataset
from fluid_core.random import sample_keys
from fluid_core.training.loader import Batch, Collator, Slicing, read_ahead
from fluid_core.training.order import derive_key, shuffled

NAME = "train"
"""Of the dataset, between the driver and `ray.train.get_dataset_shard`."""
_COLUMNS = ("key", "captions", "moments", "moments_flip", "codes", "codes_flip", "token_ids", "text")


def streaming_dataset(data: EncodedDataset, seed: int) -> tuple[Any, Any]:
    """(ray.data.Dataset of the data set's stored rows, ray.train.DataConfig that keeps their order). One task a shard."""
    import ray
    from ray.train import DataConfig

    groups: dict[int, list[int]] = {}
    for shard, group, _ in data.row_groups:
        groups.setdefault(shard, []).append(group)
    shards = list(groups)
    items = [
        {"shard": shards[i], "groups": [groups[shards[i]][j] for j in shuffled(len(groups[shards[i]]), "groups", seed, int(i))]}
        for i in shuffled(len(shards), "shards", data.manifest.hash, seed)
    ]

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for shard, numbers in zip(batch["shard"], batch["groups"], strict=True):
            for group in numbers:
                yield data.read_table(int(shard), int(group), _COLUMNS)

    options = DataConfig.default_ingest_options()
    options.preserve_order = True
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(read, batch_size=1)
    return dataset, DataConfig(execution_options=options, enable_shard_locality=False)


class RayDataLoader:
    """Batches of one worker, out of its part of the stream: what `Loader` is to the Parquet files.

    Args:
        shard: `ray.train.get_dataset_shard(NAME)`.
        window: rows shuffled together, over all workers.

    Raises:
        ValueError: the data set is too small to give each worker a micro-batch.
    """

    def __init__(self, data: EncodedDataset, shard: Any, seed: int, slicing: Slicing, window: int, collator: Collator):
        self.collator, self.slicing = collator, slicing
        self.rows = len(data)
        self._data, self._shard, self._seed = data, shard, seed
        self._window = max(2, window // slicing.world_size)
        self._per_epoch = self.rows // slicing.world_size // slicing.micro
        if not self._per_epoch:
            raise ValueError(
                f"training.loader: ray_data needs {slicing.micro * slicing.world_size} rows for a micro-batch of each worker, "
                f"{data.root} has {self.rows}: lower training.micro_batch_size"
            )

    def epoch(self, position: int) -> float:
        """How often the data set has been seen at a global position (for the log)."""
        return position / (self._per_epoch * self.slicing.micro * self.slicing.world_size)

    def phase(self, position: int) -> int:
        """0: there is one data set, from the start."""
        return 0

    def stream(self, start: int, prefetch: int = 2) -> Generator[list[Batch], None, None]:
        """As `Loader.stream`."""
        self.slicing.check_start(start)
        return read_ahead(self._batches(start), prefetch)

    def _batches(self, start: int) -> Iterator[list[Batch]]:
        per_step = len(self.slicing.micro_batches(start))
        tables = self._tables(start // self.slicing.batch_size * per_step)
        while True:
            out = []
            for positions in self.slicing.micro_batches(start):
                epoch, table = next(tables)

                def choose(key: str, captions: int, epoch: int = epoch) -> int:
                    return derive_key("caption", self._seed, epoch, key) % captions

                height, width = self._data.manifest.latent_shape[-2:]
                rows = self._data.rows_of(table, (height, width), choose)
                keys_B = sample_keys(self._seed, torch.tensor(list(positions)))
                out.append(self.collator([(rows, i) for i in range(len(rows))], list(positions), keys_B))
            yield out
            start += self.slicing.batch_size

    def _tables(self, skip: int) -> Iterator[tuple[int, pa.Table]]:
        """(epoch, a micro-batch's stored rows) of this worker, without the first `skip`."""
        epoch, skip = divmod(skip, self._per_epoch)
        while True:
            batches = iter(
                self._shard.iter_batches(
                    batch_size=self.slicing.micro,
                    batch_format="pyarrow",
                    drop_last=True,
                    local_shuffle_buffer_size=self._window,
                    local_shuffle_seed=derive_key("ray", self._seed, epoch) % 2**31,
                )
            )
            for index in range(self._per_epoch):
                table = next(batches, None)
                if table is None:
                    raise RuntimeError(f"Ray Data gave {index} batches in epoch {epoch}, {self._per_epoch} were expected")
                if index >= skip:
                    yield epoch, table
            for _ in batches:  # to the end, so that the workers begin the next epoch together
                pass
            epoch, skip = epoch + 1, 0
