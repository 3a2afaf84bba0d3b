"""Where every element of every parameter lives under ZeRO: the map that Muon, EMA and checkpoints share.

DeepSpeed keeps the fp32 master weights of a worker in flat buffers, one for each optimizer sub-group. Which elements of
which parameter a buffer holds depends on the stage:

    stage 3    each parameter is cut into world_size equal pieces (the last one padded); a buffer strings the pieces together
    stage 1-2  the parameters of a group are strung together, and that string is cut into world_size equal pieces
    stage 0    every worker holds every parameter whole

`Partitions` hides the difference. It is plain arithmetic for any rank, so no communication is needed to know the layout
of the others.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + numel) of the flattened parameter `name` at [offset, offset + numel) of flat buffer `buffer`."""

    name: str
    start: int
    numel: int
    buffer: int
    offset: int


@dataclass(frozen=True)
class _Group:
    """The parameters of one flat buffer, in its order, and where each begins in the group's string (stages 1-2)."""

    names: list[str]
    begins: list[int]
    partition: int  # elements of one worker's buffer


class Partitions:
    """The fp32 master weights of a DeepSpeed engine, addressed by parameter name."""

    def __init__(self, engine: Any):
        self.stage: int = engine.zero_optimization_stage()
        self.rank: int = torch.distributed.get_rank()
        self.world_size: int = torch.distributed.get_world_size()
        self._zero = engine.optimizer
        self.client: torch.optim.Optimizer = engine.basic_optimizer
        name_of = {id(p): name for name, p in engine.module.named_parameters()}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()
        }
        self.after_write_back: Callable[[], None] | None = None
        self._groups: list[_Group] = []
        if self.stage == 3:
            self.buffers: list[Tensor] = list(self._zero.fp32_partitioned_groups_flat)
            for params in self._zero.fp16_groups:
                pieces = [p.partition_numel() for p in params]
                begins = [sum(pieces[:i]) for i in range(len(pieces))]
                self._groups.append(_Group([name_of[id(p)] for p in params], begins, sum(pieces)))
        elif self.stage in (1, 2):
            self.buffers = list(self._zero.single_partition_of_fp32_groups)
            for i, params in enumerate(self._zero.round_robin_bit16_groups):
                begins = list(self._zero.round_robin_bit16_offsets[i])
                self._groups.append(_Group([name_of[id(p)] for p in params], begins, self.buffers[i].numel()))
        else:
            self.buffers = []
            for group in self.client.param_groups:
                for p in group["params"]:
                    self._groups.append(_Group([name_of[id(p)]], [0], p.numel()))
                    self.buffers.append(p)

    def names(self, buffer: int) -> list[str]:
        """The parameters of which buffer `buffer` holds pieces."""
        return self._groups[buffer].names

    @property
    def replicated(self) -> bool:
        """True when every worker holds everything (stage 0)."""
        return self.stage == 0

    def segments(self, rank: int | None = None, buffer: int | None = None) -> Iterator[Segment]:
        """What `rank` (default: this worker) holds, in the order of its buffers; only of one buffer when given."""
        rank = self.rank if rank is None else rank
        for index, group in enumerate(self._groups):
            if buffer is not None and index != buffer:
                continue
            for name, begin in zip(group.names, group.begins, strict=True):
                numel = math.prod(self.shapes[name])
                if self.stage == 3:
                    piece = math.ceil(numel / self.world_size)
                    start, offset = rank * piece, begin
                    held = min(piece, numel - start)
                elif self.stage:
                    start = max(0, rank * group.partition - begin)
                    offset = max(0, begin - rank * group.partition)
                    held = min(numel - start, group.partition - offset)
                else:
                    start, offset, held = 0, 0, numel
                if held > 0:
                    yield Segment(name, start, held, index, offset)

    def states(self) -> dict[str, list[Tensor]]:
        """kind -> one flat tensor for each buffer: the masters and the optimizer's moments (`exp_avg`, `momentum`, ...).

        A buffer without that kind of state has an empty tensor in its place.
        """
        kinds: dict[str, list[Tensor]] = {"master": [b.data.view(-1) for b in self.buffers]}
        empty = torch.empty(0)
        for index, buffer in enumerate(self.buffers):
            for kind, value in self.client.state.get(buffer, {}).items():
                if isinstance(value, Tensor) and value.numel() == buffer.numel():
                    kinds.setdefault(kind, [empty] * len(self.buffers))[index] = value.view(-1)
        return kinds

    @torch.no_grad()
    def write_back(self) -> None:
        """Bring the weights that the model computes with up to date after the masters were written to directly."""
        zero = self._zero
        if self.stage == 3:
            for index in range(len(self.buffers)):
                zero.fp16_partitioned_groups_flat[index].data.copy_(self.buffers[index].data)
                zero._unflatten_partitioned_parameters(index)
            zero.parameter_offload.partition_all_parameters()
        elif self.stage:
            for index, partitions in enumerate(zero.parallel_partitioned_bit16_groups):
                partitions[self.rank].data.copy_(self.buffers[index].data)
                gathered = [torch.empty_like(p) for p in partitions]
                torch.distributed.all_gather(gathered, partitions[self.rank].contiguous())
                for target, source in zip(partitions, gathered, strict=True):
                    target.data.copy_(source)
        if self.after_write_back:
            self.after_write_back()

    def gather_to_rank0(self, flats: list[Tensor]) -> Iterator[tuple[str, Tensor | None]]:
        """(name, whole fp32 parameter on the CPU) for each parameter, from flat tensors laid out like the buffers.

        A collective: every rank must exhaust it. On other ranks than 0 the tensors are None. One parameter is whole at a time.
        """
        everyone = [{s.name: s for s in self.segments(rank)} for rank in range(self.world_size)]
        for group in self._groups:
            for name in group.names:
                mine = everyone[self.rank].get(name)
                longest = max(s[name].numel if name in s else 0 for s in everyone)
                if self.replicated:
                    yield (
                        name,
                        (flats[mine.buffer].view(-1).float().cpu().view(self.shapes[name]) if mine and not self.rank else None),
                    )
                    continue
                device = flats[0].device
                piece = torch.zeros(longest, dtype=torch.float32, device=device)
                if mine:
                    piece[: mine.numel] = flats[mine.buffer][mine.offset : mine.offset + mine.numel]
                pieces = [torch.empty_like(piece) for _ in everyone]
                torch.distributed.all_gather(pieces, piece)
                if self.rank:
                    yield name, None
                    continue
                whole = torch.empty(math.prod(self.shapes[name]))
                for held, values in zip(everyone, pieces, strict=True):
                    if name in held:
                        s = held[name]
                        whole[s.start : s.start + s.numel] = values[: s.numel].cpu()
                yield name, whole.view(self.shapes[name])


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters, counted before and after ZeRO took them apart."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters() if p.requires_grad)
