"""`pipelines/encode_dataset.py` with the recipe that ships: exit codes, and one line for what a user can mend."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from encoding_support import encoders, make_shards, recipe_values
from forked import Program

from fluid_core.cli import main as fluid
from fluid_core.config import Recipe
from fluid_core.encoding import run
from fluid_core.encoding.pipeline import encode_dataset


def _encode(folder: Path, *settings: str) -> tuple[int, str]:
    output, image, text = folder / "out", *encoders()
    ours = [f"encode.output={output}", f"image_tokenizer.path={image}", f"text_encoder.path={text}", f"runs_dir={folder}/runs"]
    ours += [f"registry.tracking_uri=sqlite:///{folder}/mlflow.db", f'data.sources=["{folder}/data/*.tar"]']
    command = ["pipelines/encode_dataset.py", "--config", "configs/encode_local.yaml", "--set", *ours, *settings]
    log = folder / "log"
    log.unlink(missing_ok=True)
    return Program(command, log).end(120)


def test_all_accounted_for_is_0_and_inspect_tells_it(
    tmp_path: Path, ray_session: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "data", 2, 6)
    broken = tmp_path / "data" / "00001.tar"
    broken.write_bytes(broken.read_bytes()[:-9000])
    code, said = _encode(tmp_path, "encode.max_bad_ratio=1")
    assert code == 0, said
    with pytest.raises(SystemExit, match="0"):
        fluid(["inspect", str(tmp_path / "out"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["in"] == found["out"] + sum(found["filtered"].values()) + sum(found["quarantined"].values())
    assert 6 < found["in"] <= 13 and sum(found["quarantined"].values()) >= 1 and found["shards"] == 2
    assert len(found["latent_mean"]) == len(found["latent_std"]) == 4 and set(found["encoders"]) == {"image", "text"}
    code, said = _encode(tmp_path, "encode.max_bad_ratio=1")
    assert code == 0 and "already complete" in said


def test_workers_that_ray_gives_up_on_end_the_run_with_one_line(
    tmp_path: Path, ray_session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same command goes on. An error of our own code keeps its traceback."""
    make_shards(tmp_path / "data", 1, 2)
    recipe = Recipe.model_validate(recipe_values(tmp_path, [str(tmp_path / "data")], tmp_path / "out"))
    raised: list[Exception] = [ray.exceptions.OutOfMemoryError("killed\nby Ray"), RuntimeError("ours")]

    def reports(*_: Any) -> Iterator[Any]:
        raise raised.pop(0)
        yield

    with monkeypatch.context() as patch:
        patch.setattr(run, "_reports", reports)
        with pytest.raises(ConnectionError, match=r"OutOfMemoryError: killed\): what was committed stays") as told:
            encode_dataset(recipe)
        assert "\n" not in str(told.value)
        with pytest.raises(RuntimeError, match="ours"):
            encode_dataset(recipe)
    (manifest,) = encode_dataset(recipe)
    assert manifest.counts["out"] == 2


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ('data.sources=["nowhere/*.tar"]', "nowhere/*.tar"), ("data.sources=[]", "data.sources"),
        ("image_tokenizer.path=runs/none", "runs/none"), ("text_encoder.dtype=fp16", "'bf16' or 'fp32'"), ("encode.batchsize=3", "batch_size"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_2_and_one_line(setting: str, reason: str, tmp_path: Path) -> None:
    make_shards(tmp_path / "data", 1, 2)
    code, said = _encode(tmp_path, setting)
    lines = [line for line in said.splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and reason in said and "Traceback" not in said, said
