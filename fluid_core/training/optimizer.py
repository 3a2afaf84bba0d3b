"""The optimizer: AdamW, and Muon for hidden matrices, both on ZeRO's flat fp32 partitions.

DeepSpeed calls `step()` with one flat buffer at a time in the group's `params`. AdamW is elementwise, so it works on the
pieces as they are. Muon (Jordan et al., 2024) replaces the update of a matrix by the nearest orthogonal matrix, so it needs
whole matrices. DeepSpeed's own Muon gathers every gradient on every worker and orthogonalises there; here each matrix has
one owner, and a step costs two small all-to-all exchanges:

    1. momentum and Nesterov update on the local pieces; the momentum stays sharded, as ZeRO shards Adam's
    2. each piece goes to the matrix's owner, in bf16
    3. owners orthogonalise their matrices, batched by shape
    4. each worker gets its pieces of the result back

So the Newton-Schulz work and its traffic are divided by the number of workers, and no worker holds more than its share.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fluid_core.muon import muon_update
from fluid_core.training.partitions import Partitions


class _Exchange:
    """Who orthogonalises which matrix of one flat buffer, and the order in which pieces travel."""

    def __init__(self, partitions: Partitions, buffer: int):
        self.rank, self.world_size = partitions.rank, partitions.world_size
        self.replicated = partitions.replicated
        held = [list(partitions.segments(rank, buffer)) for rank in range(self.world_size)]
        names = sorted({s.name for rank in held for s in rank})
        self.shapes = {name: partitions.shapes[name] for name in names}
        # Largest first to the least loaded: Newton-Schulz costs about long * short^2.
        load = [0] * self.world_size
        owner: dict[str, int] = {}
        for name in sorted(names, key=lambda n: (-_cost(self.shapes[n]), n)):
            owner[name] = min(range(self.world_size), key=lambda r: (load[r], r))
            load[owner[name]] += _cost(self.shapes[name])
        self.mine = [[s for s in held[self.rank] if owner[s.name] == rank] for rank in range(self.world_size)]
        # Pieces of the matrices that this worker owns, by the worker that holds them. Where everybody holds
        # everything nothing needs to be sent to the owner: it takes its own copy.
        self.owned = [[s for s in held[rank] if owner[s.name] == self.rank] for rank in range(self.world_size)]
        by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in names:
            if owner[name] == self.rank:
                by_shape[self.shapes[name]].append(name)
        self.batches = list(by_shape.items())
        self.place = {name: (b, i) for b, (_, group) in enumerate(self.batches) for i, name in enumerate(group)}

    def orthogonalise(self, update: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
        """`update` is this worker's flat piece; it is overwritten with that piece of the orthogonalised, scaled matrices."""
        outgoing = self.mine if not self.replicated else [m if r == self.rank else [] for r, m in enumerate(self.mine)]
        incoming = self.owned if not self.replicated else [o if r == self.rank else [] for r, o in enumerate(self.owned)]
        packed = [[update[s.offset : s.offset + s.numel].to(dtype) for s in pieces] for pieces in outgoing]
        received = self._all_to_all(packed, [sum(s.numel for s in pieces) for pieces in incoming], dtype, update.device)

        stacks = [torch.empty((len(names), *shape), dtype=dtype, device=update.device) for shape, names in self.batches]
        for pieces, flat in zip(incoming, received, strict=True):
            at = 0
            for s in pieces:
                b, i = self.place[s.name]
                stacks[b][i].view(-1)[s.start : s.start + s.numel] = flat[at : at + s.numel]
                at += s.numel
        results = [muon_update(stack, iterations).contiguous() for stack in stacks]

        def piece(s: Any) -> Tensor:
            b, i = self.place[s.name]
            return results[b][i].reshape(-1)[s.start : s.start + s.numel]

        returned = self._all_to_all(
            [[piece(s) for s in pieces] for pieces in self.owned],
            [sum(s.numel for s in pieces) for pieces in self.mine],
            dtype,
            update.device,
        )
        for pieces, flat in zip(self.mine, returned, strict=True):
            at = 0
            for s in pieces:
                update[s.offset : s.offset + s.numel] = flat[at : at + s.numel]
                at += s.numel
        return update

    def _all_to_all(
        self, packed: list[list[Tensor]], sizes: list[int], dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        if self.world_size == 1:
            return [torch.cat(packed[0]) if packed[0] else torch.empty(0, dtype=dtype, device=device)]
        flat = [t for pieces in packed for t in pieces]
        send = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)
        receive = torch.empty(sum(sizes), dtype=dtype, device=device)
        width = send.element_size()
        torch.distributed.all_to_all_single(
            receive.view(torch.uint8),  # gloo moves bytes of any kind, but does not know every dtype
            send.view(torch.uint8),
            [n * width for n in sizes],
            [sum(t.numel() for t in pieces) * width for pieces in packed],
        )
        return list(receive.split(sizes))


def _cost(shape: Sequence[int]) -> int:
    short, long = sorted(shape)
    return short * short * long


class FluidOptimizer(torch.optim.Optimizer):
    """AdamW groups (`kind: adamw`) and Muon groups (`kind: muon`) in one optimizer.

    Muon groups step only after `attach(partitions)`, which DeepSpeed's set-up makes possible; see the module's text.
    `veto` (the health policy) is asked before every update; True leaves weights and state alone. When `squares` is a dict,
    a step adds this worker's sums of squared (clipped) gradients to it, by the groups' `part`.
    """

    def __init__(self, groups: list[dict[str, Any]], iterations: int = 4, dtype: torch.dtype = torch.bfloat16):
        self.iterations = iterations
        self.dtype = dtype
        self.veto: Callable[[], bool] = lambda: False
        self.squares: dict[str, Tensor] | None = None
        self._exchanges: dict[int, _Exchange] = {}
        super().__init__(groups, {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.95})

    def attach(self, partitions: Partitions) -> None:
        """Learn the layout, and create the state of every buffer (zeros), so that it can be saved and loaded at step 0."""
        kind_of = {name: group["kind"] for group in self.param_groups for name in group["names"]}
        for index, p in enumerate(partitions.buffers):
            zeros = torch.zeros_like(p, requires_grad=False)
            if kind_of[partitions.names(index)[0]] == "muon":
                self.state[p] = {"momentum": zeros}
                self._exchanges[id(p)] = _Exchange(partitions, index)
            else:
                step = torch.zeros((), device=p.device)  # the fused kernel reads it where the weights are
                self.state[p] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": step}

    @property
    def steps(self) -> int:
        """Updates applied so far: AdamW's bias correction depends on it, so it is part of a checkpoint."""
        counts = [int(s["step"]) for s in self.state.values() if "step" in s]
        return counts[0] if counts else 0

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(float(value))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the buffers that hold a gradient. Collective when there are Muon groups."""
        if self.veto():
            return
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if self.squares is not None:
                for p in params:
                    self.squares[group["part"]] = self.squares.get(group["part"], 0) + p.grad.square().sum()
            if group["kind"] == "muon":
                for p in params:
                    self._muon(p, group)
            else:
                states = [self.state[p] for p in params]
                adamw(
                    params, [p.grad for p in params], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
                    [], [s["step"] for s in states], fused=True, amsgrad=False, beta1=group["betas"][0],
                    beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                    maximize=False,
                )  # fmt: skip

    def _muon(self, p: Tensor, group: dict[str, Any]) -> None:
        momentum, gradient = self.state[p]["momentum"].view(-1), p.grad.view(-1)  # type: ignore[union-attr]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])
        direction = self._exchanges[id(p)].orthogonalise(update, self.iterations, self.dtype)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.view(-1).add_(direction, alpha=-group["lr"])
