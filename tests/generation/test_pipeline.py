"""FluidPipeline with real encoders of random weights: images, editing, bundles, the command line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_fluid import tiny_model, tiny_pipeline

from fluid_core.cli import main
from fluid_core.generation import bundle
from fluid_core.generation.editing import tokens_to_change, variation_tokens
from fluid_core.generation.pipeline import FluidPipeline
from fluid_core.generation.reveal import GREY, Reveal

VARIANTS = [(tokens, order) for tokens in ("continuous", "discrete") for order in ("random", "raster")]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> FluidPipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("pipe"))


@pytest.fixture(scope="module")
def bundle_folder(pipe: FluidPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipe.save_pretrained(tmp_path_factory.mktemp("bundle") / "model")


def test_the_page_s_python_runs(bundle_folder: Path, repository: Path) -> None:
    page = (repository / "docs" / "generation.md").read_text()
    first, editing = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(first.replace("runs/demo/bundles/latest", str(bundle_folder)), names)
    assert [image.size for image in names["images"]] == [(32, 32)] * 2
    mask = Image.new("L", (256, 256))
    mask.paste(255, (64, 64, 128, 128))
    names |= {"image": names["images"][0].resize((256, 256)), "mask": mask}
    sizes = [eval(line, names).size for line in editing.strip().splitlines()]
    assert sizes == [(256, 256), (256, 256), (384, 256)]


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


# Generation


@pytest.mark.parametrize("tokens,order", VARIANTS)
def test_every_variant_generates_and_survives_a_bundle(tokens: str, order: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, tokens=tokens, order=order)
    images = pipe(["a red circle", "two blue squares"], seed=3)
    assert [image.size for image in images] == [(32, 32)] * 2
    again = FluidPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "bundle"))
    assert difference(again(["two blue squares"], seed=4)[0], images[1]) == 0
    assert again.generation == pipe.generation and again.model.config == pipe.model.config


def test_an_image_is_the_same_alone_and_in_a_batch_of_64(pipe: FluidPipeline) -> None:
    prompts = ["a red circle", "two blue squares", "three green apples on the left of a square", ""] * 16
    together = pipe(prompts, seed=10)
    for i in (0, 17, 63):
        assert difference(pipe(prompts[i], seed=[10 + i])[0], together[i]) <= 1
        assert difference(pipe(prompts[i : i + 2], seed=10 + i, batch_size=1)[0], together[i]) <= 1


def test_settings_have_effect(pipe: FluidPipeline) -> None:
    base = pipe("a red circle")[0]
    for change in (
        {"seed": 1}, {"num_steps": 16}, {"head_steps": 1}, {"guidance_scale": 6.0}, {"guidance_schedule": "constant"},
        {"temperature": 0.5}, {"negative_prompts": "a blue square"}, {"solver": "euler"}, {"order": "checkerboard"},
        {"order": "raster"},
    ):  # fmt: skip
        assert difference(pipe("a red circle", **change)[0], base) > 0, change
    assert difference(pipe("a red circle")[0], base) == 0


def test_non_square_sizes(pipe: FluidPipeline) -> None:
    assert pipe("a red circle", size=(64, 32))[0].size == (64, 32)
    assert pipe("a red circle", size=40, num_steps=25)[0].size == (40, 40)


def test_callback_sees_every_step(pipe: FluidPipeline) -> None:
    seen = []
    callback = lambda step, steps, slots: seen.append((step, steps, len(slots)))  # noqa: E731
    pipe(["a", "red", "apple"], num_steps=4, batch_size=2, callback=callback)
    assert seen == [(1, 4, 2), (2, 4, 2), (3, 4, 2), (4, 4, 2), (1, 4, 1), (2, 4, 1), (3, 4, 1), (4, 4, 1)]


def test_default_steps_shrink_to_a_small_grid(pipe: FluidPipeline) -> None:
    assert pipe.requests("a", size=16)[0].num_steps == 4


@pytest.mark.parametrize("arguments,message", [
    ({"size": 33}, "size 33x33: both sides must be positive multiples of 8 pixels"),
    ({"size": (32, 0)}, "positive multiples of 8"),
    ({"num_steps": 17}, "num_steps must be between 1 and the 16 tokens of a 4x4 grid, got 17"),
    ({"solver": "ddpm"}, "solver 'ddpm' does not go with objective 'flow'"),
    ({"solver": "magic"}, "solver 'magic' is unknown"),
    ({"negative_prompts": ["a", "b"]}, "2 negative_prompts for 1 prompts"),
    ({"negative_prompts": "a", "guidance_scale": 1.0}, "no effect at guidance_scale 1"),
    ({"guidance_schedule": "linear", "guidance_scale": 1.0}, "guidance_schedule has no effect at guidance_scale 1"),
    ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    ({"size": "32"}, r"size must be a side or \(width, height\) in whole pixels, got '32'"),
    ({"size": (32, 32, 32)}, "in whole pixels"),
    ({"num_steps": 4.5}, "num_steps must be a whole number, got 4.5"),
    ({"head_steps": "3"}, "head_steps must be a whole number, got '3'"),
    ({"seed": 1.5}, "seed must be a whole number, or one for each prompt, got 1.5"),
    ({"seed": ["a"]}, "seed must be a whole number, got 'a'"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
    ({"temperature": "1"}, "temperature must be a finite number, got '1'"),
    ({"guidance_schedule": ""}, "unknown guidance_schedule ''"),
    ({"order": ""}, "unknown order ''"),
    ({"prompts": [["a"]]}, r"prompts must be a string or a list of strings, got \[\['a'\]\]"),
    ({"negative_prompts": 3}, "negative_prompts must be a string or a list of strings, got 3"),
    ({"callback": 3}, "callback must be a function"),
])  # fmt: skip
def test_bad_arguments_are_named(pipe: FluidPipeline, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompts": ["a red circle"], **arguments})


def test_settings_without_effect_are_errors(tmp_path: Path) -> None:
    discrete = tiny_pipeline(tmp_path / "d", tokens="discrete")
    with pytest.raises(ValueError, match="head_steps and solver have no effect on a model of discrete tokens"):
        discrete("a", head_steps=10)
    raster = tiny_pipeline(tmp_path / "r", order="raster")
    with pytest.raises(ValueError, match="one token a step in raster order"):
        raster("a", num_steps=8)


def test_long_prompts_are_refused_unless_cutting_is_asked_for(pipe: FluidPipeline) -> None:
    long = "a red circle " * 20
    with pytest.raises(ValueError, match="longer than 12 tokens"):
        pipe(long)
    assert pipe(long, truncate=True)[0].size == (32, 32)
    with pytest.raises(ValueError, match="longer than 12 tokens"):
        pipe(long)


def test_prompts_are_encoded_once(pipe: FluidPipeline) -> None:
    first = pipe.encode_prompts(["a green apple", "a green apple"])
    assert first[0] is first[1] is pipe.encode_prompts(["a green apple"])[0]


# Editing


def test_the_dilation_rule() -> None:
    """A hole of pixels 64..191 in 256 makes tokens 3..12 anew, not 4..11."""
    mask = torch.zeros(256, 256, dtype=torch.bool)
    mask[64:192, 64:192] = True
    change = tokens_to_change(mask, (16, 16)).reshape(16, 16)
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[3:13, 3:13] = True
    assert torch.equal(change, expected)
    assert int(tokens_to_change(mask, (16, 16), dilate=0).sum()) == 64


def test_an_edit_keeps_the_other_tokens_bit_for_bit(pipe: FluidPipeline) -> None:
    image = pipe("a red circle", seed=5)[0]
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 8, 8))
    request = pipe.edit_request(image, mask, "a green apple")
    assert request.known_mask_N is not None
    assert request.known_mask_N.reshape(4, 4).tolist() == [[c > 1 or r > 1 for c in range(4)] for r in range(4)]
    slots = []
    edited = pipe.edit(image, mask, "a green apple", callback=lambda step, steps, s: slots.extend(s))
    keep = request.known_mask_N
    assert torch.equal(slots[0].tokens_NC[keep], pipe.encode_image(image)[keep])
    assert not torch.equal(slots[0].tokens_NC[~keep], pipe.encode_image(image)[~keep])
    assert edited.size == (32, 32)


def test_outpainting_and_variations(pipe: FluidPipeline) -> None:
    image = pipe("a red circle", seed=5)[0]
    slots = []
    assert pipe.outpaint(image, (48, 40), (8, 8), "a red circle", callback=lambda *all: slots.extend(all[2])).size == (48, 40)
    inside = torch.zeros(5, 6, dtype=torch.bool)
    inside[2:, 2:4] = True  # but for one ring inside the picture, its tokens stay
    encoded = slots[0].request.known_tokens_NC
    assert torch.equal(slots[0].request.known_mask_N.reshape(5, 6), inside)
    assert torch.equal(slots[0].tokens_NC[inside.flatten()], encoded[inside.flatten()])
    with pytest.raises(ValueError, match="does not fit into 40x40"):
        pipe.outpaint(image, (40, 40), (16, 0), "a red circle")
    with pytest.raises(ValueError, match="nothing to make up around it"):
        pipe.outpaint(image, (32, 32), (0, 0), "a red circle")
    with pytest.raises(ValueError, match=r"size must be \(width, height\) in whole pixels, got 48"):
        pipe.outpaint(image, 48, (0, 0), "a red circle")  # type: ignore[arg-type]
    few, many = (pipe.edit_request(image, None, "a", strength=s).known_mask_N.sum() for s in (0.25, 0.75))
    assert (int(few), int(many)) == (12, 4)
    assert difference(pipe.edit(image, None, "a", strength=0.5, seed=1), pipe.edit(image, None, "a", strength=0.5, seed=2)) > 0
    assert int(variation_tokens(1e-6, 0, (4, 4)).sum()) == 1


def test_bad_edits_are_named(pipe: FluidPipeline) -> None:
    image, mask = Image.new("RGB", (32, 32)), np.zeros((32, 32), bool)
    for arguments, message in (
        ({"mask": mask}, "the mask is empty"),
        ({"mask": None}, "needs a mask, or a strength"),
        ({"mask": mask, "strength": 0.5}, "and not both"),
        ({"mask": np.ones((8, 8))}, r"the mask is \(8, 8\), the image \(32, 32\)"),
        ({"mask": None, "strength": 0.5, "dilate": 2}, "dilate has no effect without a mask"),
        ({"mask": None, "strength": 1.5}, "strength must be above 0 and at most 1"),
        ({"mask": np.ones((32, 32)), "size": 64}, "an edit keeps the image's size"),
        ({"mask": np.eye(32), "dilate": -1}, "dilate must be a number of token rings, 0 or more, got -1"),
        ({"mask": np.eye(32), "image": np.zeros((32, 32, 3))}, "image must be a PIL image, got ndarray"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.edit(**{"image": image, "prompt": "a", **arguments})
    with pytest.raises(ValueError, match="multiples of 8"):
        pipe.edit(Image.new("RGB", (30, 32)), np.ones((32, 30)), "a")


def test_images_come_back_through_the_tokenizer(pipe: FluidPipeline) -> None:
    """encode_image and decode are inverse up to the tokenizer: the same as the tokenizer alone."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    direct = pipe.image_tokenizer.decode(pipe.image_tokenizer.encode(pixels)[:, :4])[0]
    ours = torch.from_numpy(np.asarray(pipe.decode([pipe.encode_image(image)], (4, 4))[0])).permute(2, 0, 1) / 127.5 - 1
    assert (direct - ours).abs().max() < 0.02


# Bundles


def test_a_bundle_holds_what_it_should(bundle_folder: Path) -> None:
    names = {p.relative_to(bundle_folder).as_posix() for p in bundle_folder.rglob("*") if p.is_file()}
    assert {"config.json", "model-00001.safetensors", "latent_stats.json", "README.md", "manifest.json"} <= names
    assert {"image_tokenizer/config.json", "text_encoder/config.json"} <= names
    assert set(json.loads((bundle_folder / "manifest.json").read_text())) == names - {"manifest.json"}


def copy(folder: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, target / "copy"))


def test_weights_split_into_several_files_load_again(pipe: FluidPipeline, tmp_path: Path) -> None:
    bundle.write_bundle(
        tmp_path / "b", pipe.model.config, pipe.model.state_dict().items(), pipe.generation, pipe.image_tokenizer,
        pipe.text_encoder, pipe.latent_mean, pipe.latent_std, max_shard_bytes=50_000,
    )  # fmt: skip
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == pipe.model.state_dict().keys()
    loaded = bundle.load_model(tmp_path / "b").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in pipe.model.state_dict().items())


def test_loading_is_strict(bundle_folder: Path, tmp_path: Path) -> None:
    folder = copy(bundle_folder, tmp_path)
    file = folder / "model-00001.safetensors"
    weights = load_file(file)
    gone = weights.pop("trunk.placeholder")
    save_file(weights, file)
    with pytest.raises(ValueError, match="is not the file that manifest"):
        FluidPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"1 parameters are missing, the first is trunk\.placeholder"):
        FluidPipeline.from_pretrained(folder, verify=False)
    save_file({**weights, "trunk.placeholder": gone[:5].clone()}, file)
    with pytest.raises(ValueError, match=r"trunk\.placeholder has shape \(5,\), the model's is \(32,\)"):
        FluidPipeline.from_pretrained(folder, verify=False)
    save_file({**weights, "trunk.placeholder": gone, "surplus": gone.clone()}, file)
    with pytest.raises(ValueError, match="surplus is not a parameter of this model"):
        FluidPipeline.from_pretrained(folder, verify=False)


def test_broken_bundles_are_named(bundle_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a model bundle"):
        FluidPipeline.from_pretrained(tmp_path)
    folder = copy(bundle_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99 is not 1"):
        FluidPipeline.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"lacks README\.md"):
        FluidPipeline.from_pretrained(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not written to its end"):
        FluidPipeline.from_pretrained(folder)


def test_an_existing_folder_is_not_overwritten_and_broken_weights_are_not_saved(pipe: FluidPipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists: give a new folder"):
        pipe.save_pretrained(tmp_path)
    weights = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    weights["trunk.norm_in.weight"][3] = float("nan")
    with pytest.raises(ValueError, match=r"weight trunk\.norm_in\.weight holds NaN"):
        bundle.write_bundle(
            tmp_path / "new", pipe.model.config, weights.items(), pipe.generation, pipe.image_tokenizer, pipe.text_encoder,
            pipe.latent_mean, pipe.latent_std,
        )  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"], "nothing half-written stays"


def test_parts_that_do_not_fit_are_refused(pipe: FluidPipeline, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path, tokens="discrete")
    with pytest.raises(ValueError, match="needs a kl image tokenizer, got vq"):
        FluidPipeline(pipe.model, other.image_tokenizer, pipe.text_encoder, pipe.generation, [0.0] * 4, [1.0] * 4)
    with pytest.raises(ValueError, match="need latent_mean and latent_std"):
        FluidPipeline(pipe.model, pipe.image_tokenizer, pipe.text_encoder, pipe.generation)
    with pytest.raises(ValueError, match="image tokenizer of 24 codes does not go with the model's codebook_size 16"):
        FluidPipeline(
            tiny_model(tokens="discrete", codebook_size=16), other.image_tokenizer, pipe.text_encoder, pipe.generation
        )
    with pytest.raises(ValueError, match="latent statistics for 3 channels"):
        FluidPipeline(pipe.model, pipe.image_tokenizer, pipe.text_encoder, pipe.generation, [0.0] * 3, [1.0] * 3)


def test_bf16_keeps_the_eps_head_in_fp32(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path, objective="eps").save_pretrained(tmp_path / "bundle")
    pipe = FluidPipeline.from_pretrained(folder, dtype="bf16")
    assert pipe.model.trunk.placeholder.dtype == torch.bfloat16
    assert {p.dtype for p in pipe.model.head.parameters()} == {torch.float32}
    assert pipe("a red circle")[0].size == (32, 32)
    with pytest.raises(ValueError, match="dtype 'fp16': use one of fp32, bf16"):
        FluidPipeline.from_pretrained(folder, dtype="fp16")
    with pytest.raises(ValueError, match="device 'gpu' cannot be used here"):
        FluidPipeline.from_pretrained(folder, device="gpu")


def test_weights_that_the_manifest_does_not_list_and_damaged_json_are_refused(bundle_folder: Path, tmp_path: Path) -> None:
    for name in ("model-00099.safetensors", "config.json", "manifest.json", "latent_stats.json"):
        folder = tmp_path / name
        shutil.copytree(bundle_folder, folder)
        if name.startswith("model"):
            shutil.copy(folder / "model-00001.safetensors", folder / name)
            with pytest.raises(ValueError, match=r"is not in the manifest\.json beside it"):
                FluidPipeline.from_pretrained(folder)
            with pytest.raises(ValueError, match="is in two of the model"):
                FluidPipeline.from_pretrained(folder, verify=False)
            continue
        for damage in ((folder / name).read_text()[:-9], "[]"):
            (folder / name).write_text(damage)
            with pytest.raises(ValueError, match=rf"{name} is damaged, copy the bundle again"):
                FluidPipeline.from_pretrained(folder, verify=name == "manifest.json")


def test_edits_name_what_they_cannot_take(pipe: FluidPipeline) -> None:
    image: Any = "x.png"
    with pytest.raises(ValueError, match="image must be a PIL image, got str"):
        pipe.outpaint(image, (48, 32), (0, 0), "a")
    with pytest.raises(ValueError, match=r"seed must be a whole number, got \[5\]"):
        pipe.edit(Image.new("RGB", (32, 32)), None, "a", strength=0.5, seed=[5])  # type: ignore[arg-type]


# The command line, and watching


def test_reveal_shows_unknown_tokens_grey(pipe: FluidPipeline, tmp_path: Path) -> None:
    reveal = Reveal(images=2)
    pipe(["a", "red", "apple"], num_steps=4, batch_size=2, callback=reveal)
    reveal.save(pipe, tmp_path / "r.gif")
    with Image.open(tmp_path / "r.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (64, 32)
        first = np.asarray(gif.convert("RGB"))
    cells = first.reshape(4, 8, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(32, -1, 3)
    grey = (np.abs(cells.astype(int) - GREY) < 6).all(axis=(1, 2))
    known = torch.stack([k.reshape(4, 4) for k in reveal.states[0][1]], dim=1).reshape(32)  # rows of both images, side by side
    assert 0 < known.sum() < 32 and (grey == ~known.numpy()).all()


def test_generate_command(bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "fluid_core.cli", "generate", "a red circle", "two squares", "--model", str(bundle_folder)]
    done = subprocess.run(
        [*command, "-n", "2", "--seed", "7", "-o", str(tmp_path), "--reveal", str(tmp_path / "r.gif"), "--size", "32x16"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.png", "00001.png", "00002.png", "00003.png", "r.gif"]
    assert "generate: 100%" in done.stderr and str(tmp_path / "00003.png") in done.stdout
    with Image.open(tmp_path / "00003.png") as image:
        expected = FluidPipeline.from_pretrained(bundle_folder)("two squares", seed=10, size=(32, 16))[0]
        assert difference(image, expected) <= 1
    for wrong, message in (
        (["--size", "big"], "error: --size 'big': write SIDE or WIDTHxHEIGHT"),
        (["--reveal", "r.mp4"], "error: --reveal r.mp4: the animation is a GIF"),
        (["--guidance-scale", "1e38", "-o", str(tmp_path)], "error: image 0 came out with NaN or infinite pixels"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*command[3:], *wrong])
        assert end.value.code == 2 and message in capsys.readouterr().err
