"""Validation loss that is comparable across runs, batch sizes and world sizes.

The samples are the first `count` of the validation set by the hash of their keys, and everything random about a sample
(posterior sample, mask, order, timesteps, noise) is drawn from that hash: no run-specific seed takes part.
"""

import hashlib

import torch

from fluid_core.latents.reader import EncodedDataset, Rows
from fluid_core.training.engine import Engine
from fluid_core.training.loader import Collator

_SEED = 20241013


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


class Validation:
    """The frozen validation batches of one worker.

    Every worker runs the same number of batches (ZeRO-3 forwards are collective); the last ones may repeat a sample with
    weight 0.
    """

    def __init__(self, dataset: EncodedDataset, collator: Collator, count: int, batch_size: int, rank: int, world_size: int):
        places: list[tuple[int, int, int, int]] = []
        for shard, group, _ in dataset.row_groups:
            keys = dataset.read_group(shard, group, columns=["key"]).keys
            places += [(_hash(key), shard, group, row) for row, key in enumerate(keys)]
        chosen = sorted(places)[:count]
        self.count = len(chosen)
        groups: dict[tuple[int, int], Rows] = {}
        share = -(-len(chosen) // world_size)
        mine = chosen[rank * share : (rank + 1) * share]
        self.batches = []
        for first in range(0, share, batch_size):
            part = mine[first : first + batch_size]
            weight = 1.0 if part else 0.0
            part = part or chosen[:1]
            rows = []
            for _, shard, group, row in part:
                if (shard, group) not in groups:
                    groups[shard, group] = dataset.read_group(shard, group)
                rows.append((groups[shard, group], row))
            keys_B = torch.tensor([h for h, *_ in part]) ^ _SEED
            batch = collator(rows, [0] * len(part), keys_B)
            batch.draws.drop_text_B.zero_()
            self.batches.append((batch, weight))

    @torch.no_grad()
    def loss(self, engine: Engine, null_text: torch.Tensor) -> float:
        """The mean over all masked tokens of the validation samples. Collective."""
        total = torch.zeros(2, dtype=torch.float64)
        engine.model.eval()
        for batch, weight in self.batches:
            moved = batch.to(engine.device)
            out = engine.forward(moved.tokens, moved.text_BLE, moved.text_mask_BL, null_text, moved.draws)
            total += weight * torch.tensor([float(out.loss_sum), float(out.count)], dtype=torch.float64)
        engine.model.train()
        total = total.to(engine.device)
        torch.distributed.all_reduce(total)
        return float(total[0] / total[1])
