"""The engine's allocations without the machine that it is meant for: run by test_planning.py, prints a line of JSON.

    python shapes_only.py partitions RECIPE    the last of training.workers ranks of DeepSpeed's ZeRO-3, on tensors without data
    python shapes_only.py memory RECIPE        bytes of two real steps on one of four ranks, for several settings
    python shapes_only.py t5 RECIPE            bytes that T5-XXL's encoder works with, on tensors without data

The process group is torch's fake one: collectives return at once, so one process can be any rank of any number.
"""

import gc
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluid_core.config import load_recipe
from fluid_core.model.draws import draw_training

torch.set_num_threads(1)


def start(rank: int, workers: int) -> None:
    """This process is `rank` of `workers`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(workers), LOCAL_SIZE="1", DS_ACCELERATOR="cpu")
    from fluid_core.training.native import without_extensions

    without_extensions()
    torch.distributed.init_process_group("fake", rank=rank, world_size=workers, store=FakeStore())
    import deepspeed

    deepspeed.init_distributed("gloo", dist_init_required=False)


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside that are still there, and the most there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    weakref.finalize(storage, self._gone, key, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def partitions(path: str) -> dict[str, Any]:
    """DeepSpeed's own pieces of every parameter, and where Partitions says that each rank's elements are."""
    recipe = load_recipe(path)
    world = recipe.training.workers
    start(world - 1, world)
    from fluid_core.training.ema import ShardedEMA
    from fluid_core.training.engine import Engine

    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = Engine(recipe.model, recipe.training, seed=0)
        ema = ShardedEMA(engine.partitions, recipe.training.ema_decay)
        held: dict[str, list[tuple[int, int]]] = {}
        for rank in range(world):
            for s in engine.partitions.segments(rank):
                held.setdefault(s.name, []).append((s.start, s.numel))
        wrong, padded, total = [], 0, 0
        for name, p in engine.model.named_parameters():
            piece = int(p.ds_tensor.ds_numel)
            expected = [(first, min(piece, p.ds_numel - first)) for first in range(0, int(p.ds_numel), piece)]
            if held[name] != expected or piece * world != p.ds_numel_aligned:
                wrong.append(name)
            padded += int(p.ds_numel_aligned)
            total += int(p.ds_numel)
        states = {kind: sum(t.numel() for t in flats) for kind, flats in engine.partitions.states().items()}
        states["ema"] = sum(t.numel() for t in ema.flats)
    return {"wrong": wrong, "padded": padded, "total": total, "parameters": engine.parameters, "states": states}


def memory(path: str) -> list[dict[str, float]]:
    """{"states", "peak", "planned"} of the recipe at several settings."""
    start(0, 4)
    from fluid_core.planning import memory_per_gpu
    from fluid_core.training.ema import ShardedEMA
    from fluid_core.training.engine import Engine

    found = []
    for setting in (
        {"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2},
        {"zero_stage": 3, "optimizer": "muon", "activation_checkpointing": True}, {"zero_stage": 3, "offload_optimizer": True},
        {"zero_stage": 3, "batch_size": 64},
    ):  # fmt: skip
        recipe = load_recipe(path, [f"training.{key}={value}" for key, value in setting.items()])
        model, training = recipe.model, recipe.training
        B = training.micro_batch(4)
        with Live() as live:
            engine = Engine(model, training, seed=0)
            ema = ShardedEMA(engine.partitions, training.ema_decay)
            gc.collect()
            states = live.now
            live.peak = 0
            for step in range(2):
                draws = draw_training(model, torch.arange(B) + step, model.num_tokens)
                text = torch.randn(B, model.max_text_tokens, model.text_width)
                tokens = torch.randn(B, model.num_tokens, model.token_channels)
                out = engine.forward(tokens, text, torch.ones(text.shape[:2], dtype=torch.bool), text[0], draws)
                engine.backward(out.loss_sum / out.count)
                engine.step()
                ema.update()
        planned = memory_per_gpu(model, training, 4)
        found.append({**setting, "states": states, "peak": live.peak, "planned": planned})
        del engine, ema, out
        gc.collect()
    return found


def t5(path: str) -> dict[str, float]:
    """{"weights", "working"} of the recipe's T5 v1.1 XXL for one full batch of captions of the longest kind."""
    from transformers import T5Config, T5EncoderModel

    from fluid_core.planning import T5_TOKENS_PER_BATCH

    length = load_recipe(path).text_encoder.max_tokens
    config = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode(), Live() as live, torch.no_grad():
        encoder = T5EncoderModel(config).eval()
        gc.collect()
        weights = live.now
        live.peak = 0
        encoder(input_ids=torch.zeros(T5_TOKENS_PER_BATCH // length, length, dtype=torch.int64))
    return {"weights": weights, "working": live.peak - weights}


if __name__ == "__main__":
    what = {"partitions": partitions, "memory": memory, "t5": t5}[sys.argv[1]]
    print(json.dumps(what(str(Path(sys.argv[2])))))
