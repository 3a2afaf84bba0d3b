"""On a GPU everything computes what it computes on the CPU. Skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_recipe
from tiny_fluid import padded, texts, tiny_model

from fluid_core.config import Recipe
from fluid_core.generation.engine import DecodeSlot, GenerationRequest, decode_step, start_batch
from fluid_core.model.draws import draw_training
from fluid_core.model.fluid import FluidModel
from fluid_core.random import sample_keys
from fluid_core.training import loop
from fluid_core.training.checkpoint import latest_complete, list_checkpoints, load_ema_state
from fluid_core.training.engine import compile_blocks
from fluid_core.training.metrics import read_metrics
from fluid_core.training.run import run_worker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VARIANTS: list[dict[str, Any]] = [
    {"objective": "flow"}, {"objective": "eps"}, {"objective": "v"}, {"order": "raster"}, {"tokens": "discrete"},
    {"tokens": "discrete", "order": "raster"},
]  # fmt: skip


def _loss(model: FluidModel, device: str, seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch of four."""
    config, B = model.config, 4
    generator = torch.Generator().manual_seed(1)
    shape = (B, config.num_tokens, config.token_channels) if config.tokens == "continuous" else (B, config.num_tokens)
    tokens = torch.randn(shape, generator=generator)
    if config.tokens == "discrete":
        tokens = torch.randint(config.codebook_size, shape, generator=generator)
    text, mask = padded(texts(B, seed))
    draws = draw_training(config, sample_keys(0, torch.arange(B)), config.num_tokens)
    model = model.to(device)
    out = model(tokens.to(device), text.to(device), mask.to(device), texts(1, 9)[0].to(device), draws.to(device))
    (out.loss_sum / out.count).backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(out.loss_sum) / out.count, found


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_training_step_is_that_of_the_cpu(settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    loss, gradients = _loss(model, "cpu")
    with torch.autocast("cuda", torch.bfloat16):
        low, _ = _loss(model, "cuda")
    there, found = _loss(model, "cuda")
    assert there == pytest.approx(loss, rel=1e-4) and low == pytest.approx(loss, rel=3e-2)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("compiled", [False, True])
def test_in_bf16_gradients_point_where_those_of_the_cpu_do(compiled: bool) -> None:
    """A stream of residuals in bf16, and captions each of its own length (the second and third batch: other lengths)."""
    low, model = tiny_model(), tiny_model()
    if compiled:
        compile_blocks(low)
    for seed in range(3):
        _, expected = _loss(model, "cpu", seed)
        with torch.autocast("cuda", torch.bfloat16):
            _, found = _loss(low, "cuda", seed)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            a, b = found[name].flatten().double(), gradient.flatten().double()
            if b.norm() > 1e-4:
                assert torch.cosine_similarity(a, b, dim=0) > 0.98, name


def test_the_eps_head_computes_in_fp32_under_autocast() -> None:
    model = tiny_model(objective="eps").cuda()
    seen: set[torch.dtype] = set()
    for module in model.head.modules():
        module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    with torch.autocast("cuda", torch.bfloat16):
        _loss(model, "cuda")
    assert seen == {torch.float32}


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_an_image_is_that_of_the_cpu_alone_and_in_company(settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    solver = {"eps": "ddim", "v": "dpm2", "flow": "heun"}[model.config.objective]
    states, null = texts(5), texts(1, 9)[0]

    def generate(device: str, which: list[int]) -> torch.Tensor:
        requests = [
            GenerationRequest(
                states[i].to(device), null.to(device), i, 4 + i, 3, 2.0, "linear", 0.9, solver, (model.config.grid,) * 2
            )
            for i in which
        ]
        slots: list[DecodeSlot] = start_batch(model.to(device), requests)
        while not all(slot.done for slot in slots):
            decode_step(model, [slot for slot in slots if not slot.done])
        return torch.stack([slot.tokens_NC for slot in slots]).cpu()

    with torch.no_grad():
        expected = generate("cpu", [0, 1, 2, 3, 4])
        torch.testing.assert_close(generate("cuda", [0, 1, 2, 3, 4]), expected, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(generate("cuda", [3]), expected[3:4], atol=2e-3, rtol=1e-3)


class _NoTracker:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_kwargs: None


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32", "optimizer": "muon"}, {"precision": "bf16"}, {"precision": "bf16", "zero_stage": 2, "compile": True},
        {"precision": "bf16", "activation_checkpointing": True}, {"precision": "bf16", "zero_stage": 0},
    ],
    ids=str,
)  # fmt: skip
def test_the_trainer_and_its_resume(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO under NCCL: the first loss is the one that a head of zeros has, a resume goes the same way, and the weights'
    validation loss is the CPU's."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loop, "Tracker", _NoTracker)
    recipe = small_recipe(tmp_path, workers=1, **settings)

    class Loop(loop.TrainingLoop):
        def run(self) -> dict[str, Any]:
            result = super().run()
            self._lock.close()  # as the end of its process would
            return result

    def train(recipe: Recipe) -> list[dict[str, Any]]:
        run_worker(recipe, loop.RunSettings(str(recipe.training_dir), "f", "sqlite://"), Loop)
        return read_metrics(recipe.training_dir / "metrics.jsonl")

    lines = train(recipe)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["memory_gib"] > 0 and line["mfu"] >= 0 for line in lines)
    for checkpoint in list_checkpoints(recipe.training_dir / "checkpoints"):
        if checkpoint.step > 2:
            (checkpoint.path / "_COMPLETE").unlink()
    again = train(recipe)
    for before, after in zip(lines, again, strict=True):
        assert after["keys_sha256"] == before["keys_sha256"]
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4 if settings["precision"] == "fp32" else 1e-2)
    newest = latest_complete(recipe.training_dir / "checkpoints", verify=True)
    assert newest is not None and newest.step == 6
    model = FluidModel(recipe.model)
    model.load_state_dict(dict(load_ema_state(newest.path)))
    expected = _validation_loss(recipe, model)
    found = read_metrics(recipe.training_dir / "validation.jsonl")[-1]["validation_loss_ema"]
    assert found == pytest.approx(expected, rel=1e-4 if settings["precision"] == "fp32" else 2e-2)


@torch.no_grad()
def _validation_loss(recipe: Recipe, model: FluidModel) -> float:
    from fluid_core.latents.reader import EncodedDataset
    from fluid_core.training.loader import Collator
    from fluid_core.training.validation import Validation

    data = EncodedDataset(recipe.encode.validation_output)
    collator = Collator(data.manifest, recipe.model)
    ((batch, _),) = Validation(data, collator, 16, 16, 0, 1).batches
    out = model(batch.tokens, batch.text_BLE, batch.text_mask_BL, collator.null_text_LE, batch.draws)
    return float(out.loss_sum) / out.count
