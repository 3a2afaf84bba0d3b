"""FluidPipeline: prompts in, pictures out.

    from fluid_core.generation.pipeline import FluidPipeline

    pipe = FluidPipeline.from_pretrained("runs/demo/bundles/latest")
    images = pipe(["a red circle", "two blue squares"], seed=0)

Shapes: N tokens, C token channels, L text tokens, E text width.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fluid_core.config import GenerationConfig
from fluid_core.generation import bundle
from fluid_core.generation.editing import tokens_to_change, variation_tokens
from fluid_core.generation.engine import DecodeSlot, GenerationRequest, check_request, decode_step, start_batch
from fluid_core.model.fluid import FluidModel
from fluid_core.model.tokens import denormalise, normalise, patchify, unpatchify

Callback = Callable[[int, int, list[DecodeSlot]], None]
"""callback(step, steps, slots) after every autoregressive step of a batch; `step` counts from 1."""

_CACHED_PROMPTS = 1024
_DECODED_TOGETHER = 32
BATCH_SIZE = 64
"""Pictures that step together when the caller does not say how many."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FluidPipeline:
    """A model with its two frozen encoders and its generation defaults."""

    def __init__(
        self,
        model: FluidModel,
        image_tokenizer: Any,
        text_encoder: Any,
        generation: GenerationConfig,
        latent_mean: list[float] | None = None,
        latent_std: list[float] | None = None,
    ):
        config = model.config
        wanted = "kl" if config.tokens == "continuous" else "vq"
        if image_tokenizer.kind != wanted:
            raise ValueError(f"a model of {config.tokens} tokens needs a {wanted} image tokenizer, got {image_tokenizer.kind}")
        if text_encoder.width != config.text_width:
            raise ValueError(f"the text encoder's width {text_encoder.width} is not the model's text_width {config.text_width}")
        if text_encoder.max_tokens > config.max_text_tokens:
            raise ValueError(
                f"the text encoder gives up to {text_encoder.max_tokens} tokens, the model takes {config.max_text_tokens}"
            )
        if config.tokens == "continuous":
            if latent_mean is None or latent_std is None:
                raise ValueError("continuous tokens need latent_mean and latent_std, one value for each latent channel")
            if not len(latent_mean) == len(latent_std) == image_tokenizer.latent_channels == config.latent_channels:
                raise ValueError(
                    f"latent statistics for {len(latent_mean)} channels, a tokenizer of {image_tokenizer.latent_channels} "
                    f"and a model of {config.latent_channels} latent channels do not go together"
                )
        elif image_tokenizer.codebook_size != config.codebook_size:
            raise ValueError(
                f"an image tokenizer of {image_tokenizer.codebook_size} codes does not go with the model's codebook_size "
                f"{config.codebook_size}"
            )
        self.model = model.eval()
        self.image_tokenizer, self.text_encoder = image_tokenizer, text_encoder
        self.generation = generation
        self.latent_mean, self.latent_std = latent_mean, latent_std
        self._prompts: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: str | None = None,
        verify: bool = True,
        tracking_uri: str | None = None,
    ) -> "FluidPipeline":
        """Load a bundle folder, or `models:/name@alias` from the MLflow registry.

        Args:
            dtype: "fp32" or "bf16" of aligner and trunk (default fp32 on CPU, bf16 elsewhere). The head is in
                fp32, or with `head_precision: bf16` as the trunk is.
            verify: compare every file with the bundle's manifest first.
            tracking_uri: the registry; default MLFLOW_TRACKING_URI, then the recipe default.
        """
        folder = _registered(str(path), tracking_uri) if str(path).startswith("models:/") else Path(path)
        config = bundle.read_config(folder)
        if verify:
            bundle.verify_bundle(folder)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
        dtype = dtype or ("fp32" if torch.device(device).type == "cpu" else "bf16")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
        model = bundle.load_model(folder).to(device)
        model.aligner.to(DTYPES[dtype])
        model.trunk.to(DTYPES[dtype])
        if model.config.head_precision == "bf16":
            model.head.to(DTYPES[dtype])
        return cls(
            model,
            bundle.load_encoder(folder, "image_tokenizer", device),
            bundle.load_encoder(folder, "text_encoder", device),
            GenerationConfig.model_validate(config["generation"]),
            *bundle.load_latent_stats(folder),
        )

    def save_pretrained(self, path: str | Path, readme: str | None = None) -> Path:
        """Write a bundle folder (generation/bundle.py describes it). The folder must not exist yet."""
        return bundle.write_bundle(
            path,
            self.model.config,
            self.model.state_dict().items(),
            self.generation,
            self.image_tokenizer,
            self.text_encoder,
            self.latent_mean,
            self.latent_std,
            readme,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pixels_per_token(self) -> int:
        patch = self.model.config.patch if self.model.config.tokens == "continuous" else 1
        return self.image_tokenizer.stride * patch

    def __call__(
        self,
        prompts: str | Sequence[str],
        num_steps: int | None = None,
        head_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        solver: str | None = None,
        order: str | None = None,
        truncate: bool = False,
        callback: Callback | None = None,
        batch_size: int | None = None,
    ) -> list[Image.Image]:
        """One picture for each prompt.

        What is None is taken from the bundle's generation defaults. The picture of a prompt and seed is the same alone, in
        a batch, and at any place of it.

        Args:
            num_steps: autoregressive steps, 1..tokens (raster order: always one token a step).
            head_steps: diffusion or flow steps for each token.
            guidance_scale: 1 = none. guidance_schedule: "constant", or "linear" in tokens generated (rising).
            temperature: of the sampling noise, or of the softmax.
            negative_prompts: what to steer away from, one for all or one for each prompt.
            seed: picture i takes seed + i; or one seed for each.
            size: pixels, one side or (width, height); other than the training size by interpolated positions.
            solver: eps, v: ddpm, ddim, dpm2; flow: euler, heun.
            order: random, checkerboard or raster.
            truncate: cut prompts that are longer than the text limit instead of refusing them.
            batch_size: pictures that step together.
        """
        requests = self.requests(
            prompts,
            num_steps=num_steps,
            head_steps=head_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            negative_prompts=negative_prompts,
            seed=seed,
            size=size,
            solver=solver,
            order=order,
            truncate=truncate,
        )
        return self.run(requests, callback=callback, batch_size=batch_size)

    def edit(
        self,
        image: Image.Image,
        mask: Image.Image | np.ndarray | None,
        prompt: str,
        strength: float | None = None,
        dilate: int | None = None,
        seed: int = 0,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Image.Image:
        """Make a part of a picture anew: where `mask` is white (non-zero), or, without a mask, a random share `strength`
        of its tokens (a variation). The other tokens stay bit for bit. `settings` are those of `__call__` for one image.

        `dilate`: rings of tokens around the mask that are made anew too; default one (generation/editing.py says why).
        """
        request = self.edit_request(image, mask, prompt, strength=strength, dilate=dilate, seed=seed, **settings)
        return self.run([request], callback=callback)[0]

    def outpaint(
        self,
        image: Image.Image,
        size: tuple[int, int],
        offset: tuple[int, int],
        prompt: str,
        **settings: Any,
    ) -> Image.Image:
        """A larger picture, (width, height) = `size`, with `image` at `offset` (x, y) and the rest made up."""
        if not isinstance(image, Image.Image):
            raise ValueError(f"image must be a PIL image, got {type(image).__name__}")
        size, (x, y) = _pair("size must be (width, height)", size), _pair("offset must be (x, y)", offset)
        if size == image.size:
            raise ValueError(f"size {size} is the image's own: there is nothing to make up around it")
        if x < 0 or y < 0 or x + image.width > size[0] or y + image.height > size[1]:
            raise ValueError(f"an image of {image.width}x{image.height} at {offset} does not fit into {size[0]}x{size[1]}")
        # The outside is filled with the border's pixels, so that what the tokenizer sees of it beside the image is plausible.
        pixels = np.asarray(image.convert("RGB"))
        around = ((y, size[1] - y - image.height), (x, size[0] - x - image.width), (0, 0))
        mask = np.pad(np.zeros(pixels.shape[:2], bool), around[:2], constant_values=True)
        return self.edit(Image.fromarray(np.pad(pixels, around, mode="edge")), mask, prompt, **settings)

    def requests(
        self,
        prompts: str | Sequence[str],
        *,
        num_steps: int | None = None,
        head_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        solver: str | None = None,
        order: str | None = None,
        truncate: bool = False,
    ) -> list[GenerationRequest]:
        """What the engine is asked for: `__call__` without the running. Checked; ValueError names what to mend."""
        prompts = _strings("prompts", prompts)
        defaults, config = self.generation, self.model.config
        grid = self.grid_of(size)
        guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        if negative_prompts is None:
            negatives = [""] * len(prompts)
        else:
            if guidance_scale == 1.0:
                raise ValueError("negative_prompts have no effect at guidance_scale 1: raise it or drop them")
            negatives = _strings("negative_prompts", negative_prompts) * (
                len(prompts) if isinstance(negative_prompts, str) else 1
            )
        if guidance_schedule is not None and guidance_scale == 1.0:
            raise ValueError("guidance_schedule has no effect at guidance_scale 1: raise it or leave the schedule out")
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative_prompts for {len(prompts)} prompts: give one, or one for each")
        seeds = [int(seed) + i for i in range(len(prompts))] if isinstance(seed, Integral) else seed
        if not isinstance(seeds, Sequence):
            raise ValueError(f"seed must be a whole number, or one for each prompt, got {seed!r}")
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one, or one for each")
        if config.tokens == "discrete" and (head_steps is not None or solver is not None):
            raise ValueError("head_steps and solver have no effect on a model of discrete tokens: leave them out")
        if config.order == "raster" and (order is not None or num_steps not in (None, grid[0] * grid[1])):
            raise ValueError("a raster-order model generates one token a step in raster order: leave out num_steps and order")
        states = self.encode_prompts(prompts + negatives, truncate=truncate)
        requests = [
            GenerationRequest(
                text_LE=text_LE,
                negative_text_LE=negative_LE,
                seed=one_seed,
                num_steps=self._steps(num_steps, grid),
                head_steps=defaults.head_steps if head_steps is None else head_steps,
                guidance_scale=guidance_scale,
                guidance_schedule=defaults.guidance_schedule if guidance_schedule is None else guidance_schedule,
                temperature=defaults.temperature if temperature is None else temperature,
                solver=defaults.solver if solver is None else solver,
                grid=grid,
                order=config.order if order is None else order,
            )
            for text_LE, negative_LE, one_seed in zip(states[: len(prompts)], states[len(prompts) :], seeds, strict=True)
        ]
        for request in requests:
            check_request(self.model, request)
        return requests

    def edit_request(
        self,
        image: Image.Image,
        mask: Image.Image | np.ndarray | None,
        prompt: str,
        *,
        strength: float | None = None,
        dilate: int | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> GenerationRequest:
        """The request behind `edit`."""
        if not isinstance(image, Image.Image):
            raise ValueError(f"image must be a PIL image, got {type(image).__name__}")
        if (mask is None) == (strength is None):
            raise ValueError("an edit needs a mask, or a strength for a variation, and not both")
        if not isinstance(seed, Integral):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        if "size" in settings:
            raise ValueError("an edit keeps the image's size: leave out size, or use outpaint")
        request = self.requests([prompt], seed=seed, size=(image.width, image.height), **settings)[0]
        if mask is None:
            assert strength is not None
            if dilate is not None:
                raise ValueError("dilate has no effect without a mask: leave it out")
            change_N = variation_tokens(strength, seed, request.grid)
        else:
            change_N = tokens_to_change(_mask_pixels(mask, image), request.grid, 1 if dilate is None else dilate)
            if not bool(change_N.any()):
                raise ValueError("the mask is empty: paint what is to change white")
        known = {"known_tokens_NC": self.encode_image(image), "known_mask_N": ~change_N}
        if bool(change_N.all()):
            return request
        return GenerationRequest(**{**request.__dict__, **known})

    def run(
        self, requests: Sequence[GenerationRequest], callback: Callback | None = None, batch_size: int | None = None
    ) -> list[Image.Image]:
        """Decode requests of one grid, solver and head_steps, `batch_size` at a time (default BATCH_SIZE)."""
        if batch_size is not None and not (isinstance(batch_size, Integral) and batch_size >= 1):
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if callback is not None and not callable(callback):
            raise ValueError(f"callback must be a function of (step, steps, slots), got {callback!r}")
        images: list[Image.Image] = []
        size = batch_size or BATCH_SIZE
        for first in range(0, len(requests), size):
            slots = start_batch(self.model, requests[first : first + size])
            steps = max(len(slot.counts) for slot in slots)
            for step in range(1, steps + 1):
                decode_step(self.model, [slot for slot in slots if not slot.done])
                if callback is not None:
                    callback(step, steps, slots)
            images += self.decode([slot.tokens_NC for slot in slots], slots[0].request.grid)
        return images

    def encode_prompts(self, prompts: Sequence[str], truncate: bool = False) -> list[Tensor]:
        """The text encoder's states of the valid tokens, (L, E) each; the last 1024 prompts are remembered.

        Raises:
            ValueError: a prompt is longer than the text limit and `truncate` is False.
        """
        unique = list(dict.fromkeys(_strings("prompts", prompts)))
        # Tokenised even when remembered: a prompt that was cut on request is still refused without it.
        ids = dict(zip(unique, self.text_encoder.tokenize(unique, cut=truncate), strict=True))
        new = [prompt for prompt in unique if prompt not in self._prompts]
        # Each by itself: in company the encoder's bf16 states are rounded otherwise, and so would be the image.
        found = {prompt: self.text_encoder.encode_ids([ids[prompt]])[0] for prompt in new}
        result = [self._prompts[prompt] if prompt in self._prompts else found[prompt] for prompt in prompts]
        self._prompts.update(found)
        for prompt in prompts:
            self._prompts.move_to_end(prompt)
        while len(self._prompts) > _CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return result

    @torch.no_grad()
    def encode_image(self, image: Image.Image) -> Tensor:
        """A picture's normalised tokens (N, C), of the posterior's mean; or its codes (N,)."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        encoded = self.image_tokenizer.encode(pixels.to(self.device))
        if self.model.config.tokens == "discrete":
            return encoded.flatten()
        mean_BCHW = encoded.chunk(2, dim=1)[0].float()
        assert self.latent_mean is not None and self.latent_std is not None
        return patchify(normalise(mean_BCHW, self.latent_mean, self.latent_std), self.model.config.patch)[0]

    @torch.no_grad()
    def decode(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> list[Image.Image]:
        """Pictures from each image's tokens (N, C) or codes (N,)."""
        images: list[Image.Image] = []
        for first in range(0, len(tokens), _DECODED_TOGETHER):
            stacked = torch.stack(list(tokens[first : first + _DECODED_TOGETHER]))
            if self.model.config.tokens == "discrete":
                pixels = self.image_tokenizer.decode(stacked.reshape(-1, *grid))
            else:
                assert self.latent_mean is not None and self.latent_std is not None
                latents = unpatchify(stacked, self.model.config.patch, grid)
                pixels = self.image_tokenizer.decode(denormalise(latents, self.latent_mean, self.latent_std))
            finite_B = torch.isfinite(pixels).flatten(1).all(dim=1)
            if not bool(finite_B.all()):
                number = first + int(finite_B.int().argmin())
                raise FloatingPointError(
                    f"image {number} came out with NaN or infinite pixels: the model or its latent statistics are broken, or the "
                    "guidance or temperature is extreme"
                )
            values = ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            images += [Image.fromarray(value) for value in values]
        return images

    def grid_of(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """The token grid (h, w) of a size in pixels, one side or (width, height); None is the training size."""
        config, unit = self.model.config, self.pixels_per_token
        if size is None:
            return config.grid, config.grid
        sides = (size, size) if isinstance(size, Integral) else size
        width, height = _pair("size must be a side or (width, height)", sides)
        if width < unit or height < unit or width % unit or height % unit:
            raise ValueError(f"size {width}x{height}: both sides must be positive multiples of {unit} pixels")
        return height // unit, width // unit

    def _steps(self, num_steps: int | None, grid: tuple[int, int]) -> int:
        if self.model.config.order == "raster":
            return grid[0] * grid[1]
        return min(self.generation.num_steps, grid[0] * grid[1]) if num_steps is None else num_steps


def _strings(name: str, given: str | Sequence[str]) -> list[str]:
    values = [given] if isinstance(given, str) else given
    if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be a string or a list of strings, got {given!r:.80}")
    return list(values)


def _pair(what: str, given: object) -> tuple[int, int]:
    if not isinstance(given, Sequence) or len(given) != 2 or not all(isinstance(value, Integral) for value in given):
        raise ValueError(f"{what} in whole pixels, got {given!r}")
    return int(given[0]), int(given[1])


def _mask_pixels(mask: Image.Image | np.ndarray, image: Image.Image) -> Tensor:
    values = np.array(mask.convert("L")) if isinstance(mask, Image.Image) else np.asarray(mask)
    if values.shape != (image.height, image.width):
        raise ValueError(f"the mask is {values.shape[::-1]}, the image {(image.width, image.height)}: they must be equal")
    return torch.from_numpy(values > 0)


def _registered(uri: str, tracking_uri: str | None) -> Path:
    from fluid_core.config import RegistryConfig
    from fluid_core.registry.models import resolve_model

    tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    registry = RegistryConfig(tracking_uri=tracking_uri) if tracking_uri else RegistryConfig()
    return resolve_model(uri, registry).local()
