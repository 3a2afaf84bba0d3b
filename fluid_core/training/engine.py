"""The DeepSpeed engine: the model born sharded, its parameter groups, and the settings that decide its speed."""

import contextlib
import logging
import math
import os
import warnings
from typing import Any

import torch
from torch import nn

from fluid_core.config import ModelConfig, TrainingConfig
from fluid_core.model.fluid import FluidModel
from fluid_core.muon import dimensions, hidden_matrices
from fluid_core.planning import BUCKET, PERSISTENT_MODEL, PREFETCH, SUB_GROUP
from fluid_core.precision import uses_bf16
from fluid_core.training.optimizer import FluidOptimizer
from fluid_core.training.partitions import Partitions

PERSISTENT_PARAMETER = 100_000
"""Of a model too large to stay gathered, parameters of up to so many elements do."""


def quiet() -> None:
    """Keep DeepSpeed's chatter and one deprecation warning that it raises on every step out of the logs."""
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor|_base).*deprecated.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")


def device() -> torch.device:
    """This worker's device: the GPU that Ray gave it, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def parameter_groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """The optimizer's groups, by `kind`. No weight decay on 1-D parameters, embeddings, positions and the head (as MAR).

    `base_lr` is the learning rate that the schedule scales; `names` lists the parameters for the partition map.
    """
    matrices = {name for name, _ in hidden_matrices(model)} if training.optimizer == "muon" else set()
    members: dict[tuple[str, str, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, p in model.named_parameters():
        head = name.startswith("head.")
        decays = not head and dimensions(p) > 1 and not any(word in name for word in ("embed", "position", "mask_token"))
        kind = "muon" if name in matrices else "adamw"
        members.setdefault((kind, "head" if head else "trunk", decays), []).append((name, p))
    return [
        {
            "params": [p for _, p in pairs],
            "names": [name for name, _ in pairs],
            "kind": kind,
            "part": part,
            "base_lr": training.muon_learning_rate if kind == "muon" else training.learning_rate,
            "lr": 0.0,
            "betas": tuple(training.betas),
            "weight_decay": training.weight_decay if decays else 0.0,
        }
        for (kind, part, decays), pairs in sorted(members.items())
    ]


def deepspeed_config(training: TrainingConfig, world_size: int, parameters: int, on: torch.device) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. Parameters are fp32; with bf16 the trunk computes in it under autocast."""
    on_gpu = on.type == "cuda"
    micro = training.micro_batch(world_size)
    small = parameters < PERSISTENT_MODEL
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.zero_stage:
        # overlap_comm buys nothing on CPU, where the same cores compute and copy; bucket sizes hold a small model whole.
        # Gradients are strung together for the exchange anyway: a contiguous bucket first would be one copy more.
        zero |= {"overlap_comm": on_gpu, "contiguous_gradients": on_gpu, "reduce_scatter": True}
        zero["reduce_bucket_size"] = max(1, parameters) if small else BUCKET
    if training.zero_stage == 3:
        threshold = parameters if small else PERSISTENT_PARAMETER
        zero |= {
            # DeepSpeed's own linear function avoids keeping gathered weights alive for the backward pass. Where the
            # whole model stays gathered it saves nothing, and it is much slower than torch's on CPU.
            "memory_efficient_linear": not small,
            "stage3_param_persistence_threshold": threshold,
            "stage3_model_persistence_threshold": max(threshold, 10_000_000),
            "stage3_prefetch_bucket_size": PREFETCH,
            "stage3_max_live_parameters": 1_000_000_000,
            "sub_group_size": SUB_GROUP,
        }
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": micro * world_size * accumulation_steps(training, world_size),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation_steps(training, world_size),
        "gradient_clipping": training.gradient_clip if training.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": uses_bf16(training.precision, on),
            "dtype": "bfloat16",
            # Trunk and aligner weights travel in bf16 between GPUs; the head has linear layers of its own and stays fp32.
            "lower_precision_safe_modules": ["fluid_core.model.layers.Linear"] if on_gpu else [],
        },
        "steps_per_print": 10**9,
    }


def accumulation_steps(training: TrainingConfig, world_size: int) -> int:
    """Micro-batches a worker runs for one optimizer step."""
    return max(1, training.batch_size // (world_size * training.micro_batch(world_size)))


def compile_blocks(model: Any) -> None:
    """torch.compile of what computes. Block by block: all blocks of a kind share one compilation.

    Compiled, norms read half-precision residuals at no cost, so the stream of residuals is in half precision under autocast.
    Several launch shapes of every norm and sum are tried: the usual ones take up to twice the time for heads of 96 channels.
    """
    whole_rows()
    model.trunk.half_residuals = True
    options: dict[str, Any] = {"max_autotune_pointwise": True}
    for part in (*model.aligner.blocks, *model.trunk.blocks, model.head):
        part.compile(options=options)
    for block in model.trunk.blocks:
        block.cross.keys_values = torch.compile(block.cross.keys_values, options=options)


def whole_rows() -> None:
    """Let the compiler's reductions over heads and widths (up to 4,096 channels) hold a row at once, in this process.

    It would loop over rows of more than 1,024 channels, and over heads of 96, and read them more often: norms of heads took two
    to three times as long, a step of 1.1B 1% longer (docs/journal.md).
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class WholeRows(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            limit = 4096 if features.get_reduction_hint() == ReductionHint.INNER else 128
            return not cooperative_reduction and V.graph.sizevars.statically_known_leq(features.reduction_numel, limit)

    V.set_choices_handler(WholeRows())


class Engine:
    """A FluidModel under DeepSpeed: forward, backward, step, and the map of its partitions."""

    def __init__(self, model_config: ModelConfig, training: TrainingConfig, seed: int):
        import deepspeed

        quiet()
        self.training = training
        self.device = device()
        self.world_size = torch.distributed.get_world_size()
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with torch.device("meta"):
            self.parameters = sum(p.numel() for p in FluidModel(model_config).parameters())
        config = deepspeed_config(training, self.world_size, self.parameters, self.device)
        # The same seed on every worker at any world size: ZeRO broadcasts rank 0's values anyway, piece by piece.
        torch.manual_seed(seed)
        with deepspeed.zero.Init(config_dict_or_path=config) if training.zero_stage == 3 else contextlib.nullcontext():
            model = FluidModel(model_config)
        self.optimizer = FluidOptimizer(
            parameter_groups(model, training),
            iterations=training.muon_iterations,
            dtype=torch.bfloat16 if uses_bf16(training.precision, self.device) else torch.float32,
        )
        self.ds, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config, dist_init_required=False)
        self.model: nn.Module = self.ds.module
        model.trunk.activation_checkpointing = training.activation_checkpointing
        if training.compile:
            compile_blocks(model)
        self.partitions = Partitions(self.ds)
        self.optimizer.attach(self.partitions)
        # DeepSpeed would gather the persistent parameters again one by one after each step; `step` does it in one go.
        self._persistent: list[Any] = []
        self._norm: torch.Tensor | None = None
        if training.zero_stage == 3:
            self._persistent, self.ds.optimizer.persistent_parameters = self.ds.optimizer.persistent_parameters, []
            self.partitions.after_write_back = self._gather_persistent
            if self.parameters < PERSISTENT_MODEL:
                # All weights stay gathered from one step to the next, so there is nothing to fetch or release at each
                # module: on CPU those hooks would take longer than the all-gather. Gradients, masters, optimizer state
                # and EMA stay partitioned.
                self.ds.optimizer.parameter_offload._remove_module_hooks()
                self._gather_persistent()

    def _gather_persistent(self) -> None:
        by_dtype: dict[torch.dtype, list[Any]] = {}
        for p in self._persistent:
            if p.ds_status.name == "NOT_AVAILABLE":
                by_dtype.setdefault(getattr(p, "comm_dtype", p.dtype), []).append(p)
        for absent in by_dtype.values():
            absent[0].all_gather_coalesced(absent).wait()

    def set_learning_rate(self, factor: float) -> float:
        """Scale every group's base rate; returns the first AdamW group's rate, for the log."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self.training.learning_rate * factor

    def forward(self, *args: Any) -> Any:
        return self.ds(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients are averaged over workers by ZeRO; the caller's loss already undoes that and holds the global mean."""
        self.ds.backward(loss, scale_wrt_gas=False)

    @property
    def gradient_norm(self) -> float:
        """The global norm before clipping, once `step` has computed it; DeepSpeed gives -1 or inf when it is not finite."""
        norm = getattr(self.ds.optimizer, "_global_grad_norm", None) if self.training.zero_stage else self._norm
        return float(norm) if norm is not None else math.nan

    def step(self) -> None:
        """After every `backward`; clips and updates at an accumulation boundary."""
        if self.training.zero_stage == 0 and self.ds.is_gradient_accumulation_boundary():
            # Without ZeRO the engine would clip too, but keep the norm to itself.
            self._norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.gradient_clip)
        self.ds.step()
        self._gather_persistent()
