"""ZeRO-3 against a dense reference, and resumes that are exact: at the same world size to the bit, at others to rounding.

One run of two gloo workers is the reference for everything here; Muon's groups and AdamW's are both in it.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import run_workers, small_recipe
from torch import Tensor

from fluid_core.cli import main
from fluid_core.config import Recipe
from fluid_core.latents.reader import EncodedDataset
from fluid_core.model.fluid import FluidModel
from fluid_core.muon import hidden_matrices, orthogonalise
from fluid_core.training.checkpoint import latest_complete, list_checkpoints, load_ema_state, pin
from fluid_core.training.ema import ema_decay
from fluid_core.training.loader import Loader, Slicing
from fluid_core.training.metrics import read_metrics
from fluid_core.training.schedule import learning_rate_factor


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Six steps, a checkpoint every two. Norms are about .2: this clip cuts some of them."""
    recipe = small_recipe(tmp_path_factory.mktemp("reference"), optimizer="muon", gradient_clip=0.2)
    run_workers(recipe)
    return recipe


def _lines(recipe: Recipe) -> list[dict[str, Any]]:
    lines = read_metrics(recipe.training_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, recipe.training.max_steps + 1))
    return lines


def _continue_from(reference: Recipe, folder: Path, step: int, **training: Any) -> Recipe:
    """A run that was killed after `step`'s checkpoint: later checkpoints never existed, metrics go one step further."""
    recipe = reference.model_copy(update={"runs_dir": str(folder)})
    recipe.training = reference.training.model_copy(update=training)
    target = recipe.training_dir
    shutil.copytree(reference.training_dir, target)
    for checkpoint in list_checkpoints(target / "checkpoints"):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[: step + 1]) + '{"step": 99, "cut o')
    return recipe


def test_zero3_equals_a_dense_single_process(reference: Recipe) -> None:
    """Loss, gradient norms and the average's distance of six steps of AdamW and Muon with global clipping; weights and EMA after them."""
    training = reference.training
    loader = Loader([(EncodedDataset(reference.encode.output), 1.0)], reference.model, reference.seed, Slicing(12, 0, 1, None))
    torch.manual_seed(reference.seed)
    model = FluidModel(reference.model)
    muon = {name for name, _ in hidden_matrices(model)}
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    state: dict[str, list[Tensor]] = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    assert sum(line["grad_norm"] > training.gradient_clip for line in _lines(reference)) > 2
    for line in _lines(reference):
        step = line["step"]
        batch = loader.batches((step - 1) * 12)[0]
        model.zero_grad()
        out = model(batch.tokens, batch.text_BLE, batch.text_mask_BL, loader.collator.null_text_LE, batch.draws)
        loss = out.loss_sum / out.count
        loss.backward()
        squares = {name: float(p.grad.double().square().sum()) for name, p in model.named_parameters() if p.grad is not None}
        assert squares.keys() == ema.keys()
        head = sum(value for name, value in squares.items() if name.startswith("head."))
        assert line["grad_norm_head"] == pytest.approx(head**0.5, rel=1e-3)
        assert line["grad_norm_trunk"] == pytest.approx((sum(squares.values()) - head) ** 0.5, rel=1e-3)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip))
        assert float(loss) == pytest.approx(line["loss"], abs=1e-5)
        assert norm == pytest.approx(line["grad_norm"], rel=1e-4)
        factor = learning_rate_factor(training, step)
        with torch.no_grad():
            for name, p in model.named_parameters():
                first, second = state[name]
                decays = p.ndim == 2 and not name.startswith("head.") and not any(w in name for w in ("embed", "position"))
                if name in muon:
                    first.lerp_(p.grad, 0.05)
                    update = (
                        orthogonalise(p.grad.lerp(first, 0.95)[None], training.muon_iterations)[0] * 0.2 * max(p.shape) ** 0.5
                    )
                    rate = training.muon_learning_rate * factor
                else:
                    first.lerp_(p.grad, 0.1)
                    second.mul_(0.95).addcmul_(p.grad, p.grad, value=0.05)
                    update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
                    rate = training.learning_rate * factor
                p.mul_(1 - rate * (training.weight_decay if decays else 0.0)).sub_(update, alpha=rate)
                ema[name].lerp_(p, 1 - ema_decay(training.ema_decay, step - 1))
            distance = sum(float((ema[name] - p).double().square().sum()) for name, p in model.named_parameters()) ** 0.5
        assert line["ema_distance"] == pytest.approx(distance, rel=1e-3)
    newest = latest_complete(reference.training_dir / "checkpoints", verify=True)
    assert newest is not None and newest.step == 6
    for kind, dense in (("master", dict(model.named_parameters())), ("ema", ema)):
        for name, values in load_ema_state(newest.path, kind):
            assert torch.allclose(values, dense[name], atol=2e-4), (kind, name, float((values - dense[name]).abs().max()))


def test_resume_is_exact_to_the_bit(reference: Recipe, tmp_path: Path) -> None:
    """From step 2 with step 4's checkpoint damaged: it is passed over with a message, and nothing differs afterwards."""
    recipe = _continue_from(reference, tmp_path, step=4)
    shard = recipe.training_dir / "checkpoints" / "step_00000004" / "rank_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    pin(list_checkpoints(recipe.training_dir / "checkpoints")[-1])
    out = run_workers(recipe)
    assert "passing over checkpoint step_00000004" in out and "bytes, expected" in out
    redone = list_checkpoints(recipe.training_dir / "checkpoints")[1]
    assert redone.step == 4 and redone.problem() is None and redone.pinned
    _assert_identical(recipe, reference, {"master", "ema", "exp_avg", "exp_avg_sq", "momentum"})
    validations = [read_metrics(r.training_dir / "validation.jsonl") for r in (recipe, reference)]
    assert validations[0] == validations[1] and [line["step"] for line in validations[0]] == [3, 6]


_KILLED_IN_STEP_4 = """
import signal
class Killed(TrainingLoop):
    def _step(self, *args):
        if self.step == 3:
            self.checkpointer.wait()
            torch.distributed.barrier()
            if self.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return super()._step(*args)
loop = Killed
"""


_AS_LARGE_MODELS = """
import fluid_core.training.engine as engine
engine.PERSISTENT_MODEL = engine.PERSISTENT_PARAMETER = 0
"""


def test_adamw_killed_and_resumed_is_exact_to_the_bit(tmp_path: Path) -> None:
    """The paper's optimizer alone: a run of six steps, one whose rank 1 is killed in the fourth, and one at other world sizes."""
    whole = small_recipe(tmp_path, run_name="whole")
    run_workers(whole)
    recipe = small_recipe(tmp_path, run_name="killed")
    run_workers(recipe, _KILLED_IN_STEP_4, ok=False)
    assert [c.step for c in list_checkpoints(recipe.training_dir / "checkpoints")] == [2]
    assert read_metrics(recipe.training_dir / "metrics.jsonl")[-1]["step"] == 3
    run_workers(recipe)
    _assert_identical(recipe, whole, {"master", "ema", "exp_avg", "exp_avg_sq"})
    _resume_at_other_world_sizes(whole, tmp_path)


def test_zero3_that_gathers_module_by_module(reference: Recipe, tmp_path: Path) -> None:
    """As models above 50M parameters train: nothing stays gathered. In micro-batches, the same run within rounding; killed, to the bit."""
    large = reference.model_copy(update={"runs_dir": str(tmp_path / "large")})
    large.training = reference.training.model_copy(update={"micro_batch_size": 3})
    run_workers(large, _AS_LARGE_MODELS)
    for ours, theirs in zip(_lines(large), _lines(reference), strict=True):
        assert ours["keys_sha256"] == theirs["keys_sha256"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    ours, theirs = (dict(load_ema_state(r.training_dir / "checkpoints" / "step_00000006")) for r in (large, reference))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    again = _continue_from(large, tmp_path / "again", step=4)
    run_workers(again, _AS_LARGE_MODELS)
    _assert_identical(again, large, {"master", "ema", "exp_avg", "exp_avg_sq", "momentum"})


def _assert_identical(recipe: Recipe, reference: Recipe, kinds: set[str]) -> None:
    """Metrics of every step, and each element of the last checkpoint, whose tensors are of these kinds."""
    timing = ("seconds", "images", "data_wait", "tflops", "memory", "checkpoint")
    for ours, theirs in zip(_lines(recipe), _lines(reference), strict=True):
        ours, theirs = ({k: v for k, v in line.items() if not k.startswith(timing)} for line in (ours, theirs))
        assert ours == theirs
    for rank in (0, 1):
        name = f"checkpoints/step_00000006/rank_{rank:05d}.safetensors"
        ours, theirs = (load_file(r.training_dir / name) for r in (recipe, reference))
        assert ours.keys() == theirs.keys() and {key.split("/")[0] for key in ours} == kinds
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_resume_at_other_world_sizes(reference: Recipe, tmp_path: Path) -> None:
    _resume_at_other_world_sizes(reference, tmp_path)


def _resume_at_other_world_sizes(reference: Recipe, tmp_path: Path) -> None:
    """2 -> 1 -> 3 workers, from ZeRO-3 to 2, and to 3 with its optimizer offloaded, both in micro-batches: the same samples and
    losses within rounding.

    Of the checkpoints are kept the last, the one that is pinned, and that of every fourth step where it is asked for.
    """
    one = _continue_from(
        reference, tmp_path / "one", step=2, workers=1, max_steps=4, zero_stage=2, keep_last=1, micro_batch_size=4
    )
    pin(list_checkpoints(one.training_dir / "checkpoints")[0])
    run_workers(one)
    assert [(c.step, c.state["world_size"]) for c in list_checkpoints(one.training_dir / "checkpoints")] == [(2, 2), (4, 1)]
    more = {"workers": 3, "max_steps": 6, "zero_stage": 3, "offload_optimizer": True, "micro_batch_size": 2}
    more |= {"checkpoint_every": 1, "keep_every": 4}
    three = one.model_copy(update={"training": one.training.model_copy(update=more)})
    run_workers(three)
    kept = [(c.step, c.state["world_size"]) for c in list_checkpoints(three.training_dir / "checkpoints")]
    assert kept == [(2, 2), (4, 1), (6, 3)], "step 5 made room for step 6"
    ours, theirs = (read_metrics(r.training_dir / "validation.jsonl")[-1] for r in (three, reference))
    assert ours == {name: pytest.approx(value, abs=1e-5) for name, value in theirs.items()} and ours["step"] == 6
    for ours, theirs in zip(_lines(three), _lines(reference), strict=True):
        assert ours["keys_sha256"] == theirs["keys_sha256"] and ours["samples"] == theirs["samples"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm_head"] == pytest.approx(theirs["grad_norm_head"], rel=1e-3)
    ours, theirs = (dict(load_ema_state(r.training_dir / "checkpoints" / "step_00000006")) for r in (three, reference))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def test_another_model_optimizer_or_data_set_is_refused(reference: Recipe, tmp_path: Path) -> None:
    recipe = _continue_from(reference, tmp_path, step=6, workers=1, max_steps=7)
    state = recipe.training_dir / "checkpoints" / "step_00000006" / "state.json"
    from fluid_core.workflow.stage import file_sha256

    def forge(change: dict[str, Any]) -> None:
        state.write_text(json.dumps(json.loads(state.read_text()) | change))
        (state.parent / "_COMPLETE").write_text(file_sha256(state))

    forge({"datasets": ["other"]})
    assert "was trained on other data" in run_workers(recipe, ok=False)
    adamw = recipe.model_copy(update={"training": recipe.training.model_copy(update={"optimizer": "adamw"})})
    out = run_workers(adamw, ok=False)
    assert re.search(r"step_00000006 holds no exp_avg of [\w.]+: was it trained with another optimizer\?", out), out[-4000:]
    wide = recipe.model_copy(update={"model": recipe.model.model_copy(update={"head_width": 48})})
    out = run_workers(wide, ok=False)
    found = re.search(
        r"does not fit the recipe's model: (head[\w.]+) is (\(.+?\)) in the checkpoint, (\(.+?\)) in the model", out
    )
    assert found and found[2] != found[3] and "48" in found[3] and "48" not in found[2], out[-4000:]


def test_checkpoints_command_lists_verifies_and_pins(
    reference: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _continue_from(reference, tmp_path, step=4)
    run = str(recipe.training_dir)

    def call(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        with pytest.raises(SystemExit) as end:
            main(["checkpoints", run, "--json", *arguments])
        return int(end.value.code or 0), json.loads(capsys.readouterr().out)

    code, rows = call("--pin", "2")
    assert code == 0 and [(r["step"], r["complete"], r["world_size"], r["pinned"]) for r in rows] == [
        (2, True, 2, True),
        (4, True, 2, False),
    ]
    assert all(r["bytes"] > 10_000 for r in rows)
    shard = recipe.training_dir / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))
    code, rows = call("--verify")
    assert code == 1 and rows[0]["problem"] is None and "wrong checksum" in rows[1]["problem"]
    shard.unlink()
    assert "missing" in call("--verify")[1][1]["problem"]
