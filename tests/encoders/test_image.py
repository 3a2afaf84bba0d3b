import json

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fluid_core.encoders.image import ImageTokenizer


def make(kind: str, unshuffle: int = 1, levels: int = 2, latents: int = 4):
    torch.manual_seed(0)
    geometry = {
        "in_channels": 3 * unshuffle**2,
        "out_channels": 3 * unshuffle**2,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (16,) * levels,
        "norm_num_groups": 8,
        "latent_channels": latents,
        "layers_per_block": 1,
    }
    return AutoencoderKL(**geometry) if kind == "kl" else VQModel(**geometry, num_vq_embeddings=32)


@pytest.fixture
def folder(tmp_path):
    make("kl").save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def images(side: int = 32, height: int | None = None) -> torch.Tensor:
    return torch.rand(2, 3, height or side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_stock_vae_gives_the_moments_of_diffusers(folder):
    tokenizer = ImageTokenizer.from_pretrained(folder)
    assert (tokenizer.unshuffle, tokenizer.stride, tokenizer.latent_channels) == (1, 2, 4)
    moments = tokenizer.encode(images())
    assert moments.shape == (2, 8, 16, 16)
    model = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    with torch.no_grad():
        wanted = model.encode(images()).latent_dist
        assert torch.equal(moments[:, :4], wanted.mean)
        assert torch.equal(moments[:, 4:], wanted.logvar)
        latents = wanted.mean
        assert torch.equal(tokenizer.decode(latents), model.decode(latents).sample.clamp(-1, 1))


def test_folded_vae_and_other_sizes(tmp_path):
    make("kl", unshuffle=4).save_pretrained(tmp_path)
    tokenizer = ImageTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.unshuffle, tokenizer.stride) == (4, 8)
    assert tokenizer.encode(images(64)).shape == (2, 8, 8, 8)
    wide = images(96, height=64)
    moments = tokenizer.encode(wide)
    assert moments.shape == (2, 8, 8, 12)
    assert tokenizer.decode(moments[:, :4]).shape == wide.shape
    assert tokenizer.encode(images(512)[:1]).shape == (1, 8, 64, 64)
    inner = F.pixel_unshuffle(images(64), 4)
    assert torch.equal(tokenizer.encode(images(64))[:, :4], tokenizer.model.encode(inner).latent_dist.mean)


def test_vq_codes_round_trip(tmp_path):
    make("vq", unshuffle=2).save_pretrained(tmp_path)
    tokenizer = ImageTokenizer.from_pretrained(tmp_path, "vq")
    codes = tokenizer.encode(images(32))
    assert codes.shape == (2, 8, 8)
    assert codes.dtype == torch.int64
    assert tokenizer.codebook_size == 32
    assert codes.min() >= 0 and codes.max() < 32
    rebuilt = tokenizer.decode(codes)
    assert rebuilt.shape == (2, 3, 32, 32)
    with torch.no_grad():
        whole = F.pixel_shuffle(tokenizer.model(F.pixel_unshuffle(images(32), 2)).sample, 2).clamp(-1, 1)
    torch.testing.assert_close(rebuilt, whole)


def test_identity_follows_the_weights_not_the_place(folder, tmp_path):
    first = ImageTokenizer.from_pretrained(folder)
    first.save_pretrained(tmp_path / "copy")
    copy = ImageTokenizer.from_pretrained(tmp_path / "copy").identity()
    assert copy["sha256"] == first.identity()["sha256"]
    assert set(copy) == {"path", "kind", "revision", "sha256"}

    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert ImageTokenizer.from_pretrained(folder).identity()["sha256"] != copy["sha256"]


def test_what_is_wrong_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="folder nowhere does not exist"):
        ImageTokenizer.from_pretrained("nowhere")
    with pytest.raises(ValueError, match="holds a AutoencoderKL, but kind 'vq'"):
        ImageTokenizer.from_pretrained(folder, "vq")
    with pytest.raises(ValueError, match="use kl or vq"):
        ImageTokenizer.from_pretrained(folder, "rae")
    with pytest.raises(ValueError, match="local folder, so revision"):
        ImageTokenizer.from_pretrained(folder, revision="main")
    (tmp_path / "sd").mkdir()
    folder.rename(tmp_path / "sd" / "vae")
    with pytest.raises(ValueError, match="subfolders: vae"):
        ImageTokenizer.from_pretrained(tmp_path / "sd")
    # No network in tests: a hub id that is not in the cache must fail with one line, not hang or trace back.
    with pytest.raises(ValueError, match="could not load stabilityai/no-such-model"):
        ImageTokenizer.from_pretrained("stabilityai/no-such-model")


def test_missing_weights_are_refused(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("decoder.conv_out.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.weight"):
        ImageTokenizer.from_pretrained(folder)
    path.unlink()
    with pytest.raises(ValueError, match="could not load"):
        ImageTokenizer.from_pretrained(folder)


def test_strange_channels_are_refused(tmp_path):
    model = make("kl")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["in_channels"] == 3
    broken = AutoencoderKL(in_channels=4, out_channels=3, block_out_channels=(16,), norm_num_groups=8)
    with pytest.raises(ValueError, match="both must be 3"):
        ImageTokenizer(broken, "kl")


def test_bad_tensors_say_what_was_wanted(folder):
    tokenizer = ImageTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"\(B, 3, height, width\)"):
        tokenizer.encode(torch.zeros(2, 4, 32, 32))
    with pytest.raises(ValueError, match=r"torch.uint8"):
        tokenizer.encode(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="stride 2"):
        tokenizer.encode(torch.zeros(2, 3, 33, 32))
    with pytest.raises(ValueError, match=r"latents \(B, 4"):
        tokenizer.decode(torch.zeros(2, 16, 8, 8))
    with pytest.raises(ValueError, match="no codebook"):
        _ = tokenizer.codebook_size
