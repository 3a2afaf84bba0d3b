"""The eps head and its loss compute in fp32 inside the DeepSpeed engine too, whichever way bf16 is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch, torch.distributed
torch.distributed.init_process_group("gloo", init_method=sys.argv[2], rank=0, world_size=1)
from fluid_core.training.native import without_extensions
without_extensions()
import deepspeed
from tiny_fluid import TEXT_WIDTH, padded, texts, tiny_config
from fluid_core.model.draws import draw_training
from fluid_core.model.fluid import FluidModel
from fluid_core.random import sample_keys

config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}
config[sys.argv[1]] = {"enabled": True} | ({"dtype": "bfloat16"} if sys.argv[1] == "torch_autocast" else {})
with deepspeed.zero.Init(config_dict_or_path=config):
    model = FluidModel(tiny_config(objective="eps"))
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=config, dist_init_required=False
)
head, trunk, start = set(), set(), {}
def watch(seen):
    return lambda module, inputs, output: seen.update(str(t.dtype) for t in (*inputs, output) if torch.is_tensor(t))
for name, module in engine.module.named_modules():
    if name.startswith("head."):
        module.register_forward_hook(watch(head))
    elif name.endswith("mlp.up"):
        module.register_forward_hook(lambda module, inputs, output: trunk.add(str(output.dtype)))
draws = draw_training(model.config, sample_keys(0, torch.arange(4)), 16)
loss = engine(torch.randn(4, 16, 16), *padded(texts(4)), torch.randn(1, TEXT_WIDTH), draws)
engine.backward(loss.loss_sum / loss.count)
engine.step()
print("RESULT " + json.dumps({
    "head": sorted(head), "trunk": sorted(trunk), "loss": str(loss.loss_sum.dtype), "value": float(loss.loss_sum / loss.count),
    "weights": str(engine.module.head.output.weight.dtype),
}))
"""


@pytest.mark.parametrize("mode,weights", [("bf16", "torch.bfloat16"), ("torch_autocast", "torch.float32")])
def test_the_eps_head_is_fp32_inside_the_engine(mode: str, weights: str, tmp_path: Path) -> None:
    tests = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": tests,
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode, f"file://{tmp_path}/rendezvous"],
        capture_output=True, text=True, env=environment, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(result.stdout.split("RESULT ")[1])
    assert seen["head"] == ["torch.float32"] and seen["loss"] == "torch.float32"
    assert seen["trunk"] == ["torch.bfloat16"], "the trunk does run in bf16"
    assert seen["weights"] == weights
    assert 0.8 < seen["value"] < 1.3, "the zero-initialised head survives deepspeed.zero.Init"
