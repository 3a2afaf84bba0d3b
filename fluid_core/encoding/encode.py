"""The second heavy operator: VAE and T5, as actors that hold both."""

import json
from typing import Any

import numpy as np
import ray
import torch

from fluid_core.data.storage import open_storage
from fluid_core.encoding.chunks import DecodedChunk, EncodedChunk, SampleRecord
from fluid_core.encoding.read_decode import freeze_imports
from fluid_core.encoding.settings import EncodeSettings, encoder_folder
from fluid_core.latents.text import pack_embedding, unpack_embedding
from fluid_core.latents.writer import null_text, tensor_bytes


class Encode:
    """Holds the two encoders; decoded chunks in, a line of progress out. The encoded chunk goes to its shard's committer."""

    def __init__(self, settings: EncodeSettings, committers: list[Any], outputs: list[str]):
        from fluid_core.encoders.image import ImageTokenizer
        from fluid_core.encoders.text import TextEncoder

        self.settings = settings
        self.committers = committers
        self.delivery: Any = None
        on_gpu = settings.gpus_per_worker > 0
        self.device = torch.device("cuda" if on_gpu else "cpu")
        if not on_gpu:
            torch.set_num_threads(settings.threads)
        # Of the hub the same files as where the run was started; what this node lacks is fetched.
        image, _ = encoder_folder(settings.image_path, settings.image_revision, "image_tokenizer")
        text, _ = encoder_folder(settings.text_path, settings.text_revision, "text_encoder")
        self.image_tokenizer = ImageTokenizer.from_pretrained(image, settings.kind, device=self.device)
        self.text_encoder = TextEncoder.from_pretrained(
            text, max_tokens=settings.text_max_tokens, dtype=settings.text_encoder_dtype, device=self.device
        )
        for name, encoder in (("image", self.image_tokenizer), ("text", self.text_encoder)):
            wanted, found = getattr(settings.encoders, name), encoder.identity()
            if found["sha256"] != wanted["sha256"]:
                raise ValueError(
                    f"{found['path']} holds other weights on this worker than where the run was started: "
                    f"sha256 {found['sha256'][:12]}, expected {wanted['sha256'][:12]}"
                )
        freeze_imports()
        self._store_null_text(outputs)

    def _store_null_text(self, outputs: list[str]) -> None:
        ids = self.text_encoder.tokenize([""])
        embedding = self.text_encoder.encode_ids(ids)[0].cpu() if self.settings.text_mode == "embeddings" else None
        value = (json.dumps(null_text(ids[0], embedding), sort_keys=True) + "\n").encode()
        for output in outputs:
            open_storage(output).put_bytes(value, "_null_text.json", overwrite=False)

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        chunk, pixels = DecodedChunk.from_row(batch)
        report: dict[str, Any] = {
            "shard": chunk.shard["id"],
            "output": chunk.output,
            "last": chunk.last,
            "failure": chunk.failure,
        }
        if chunk.failure is None:
            encoded = self.encode(chunk, pixels)
            # One delivery is under way while the next chunk is encoded; the committers keep what failed for the driver.
            if self.delivery is not None:
                ray.get(self.delivery)
            committer = self.committers[int(chunk.shard["id"][:8], 16) % len(self.committers)]
            self.delivery = committer.add.remote(encoded)
        report["done"] = len(chunk.samples)
        report["dropped"] = len(chunk.dropped)
        report["bad"] = sum(d.status == "quarantined" for d in chunk.dropped)
        return {"report": [json.dumps(report)]}

    def encode(self, chunk: DecodedChunk, pixels: Any) -> EncodedChunk:
        latents, latents_flip = self._latents(chunk.samples, pixels)
        token_ids, text, cut, cosines = self._captions([sample.captions for sample in chunk.samples])
        return EncodedChunk(
            chunk.shard,
            chunk.output,
            chunk.sequence,
            chunk.last,
            chunk.samples,
            chunk.dropped,
            latents,
            latents_flip if self.settings.flip else None,
            token_ids,
            text,
            cut,
            cosines,
        )

    def _latents(self, samples: list[SampleRecord], pixels: Any) -> tuple[list[bytes], list[bytes]]:
        latents, flipped = [b""] * len(samples), [b""] * len(samples)
        flat = np.frombuffer(pixels, dtype=np.uint8)
        offsets = np.cumsum([0, *(3 * s.size[0] * s.size[1] for s in samples)])
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, sample in enumerate(samples):
            by_size.setdefault(sample.size, []).append(index)
        for (height, width), indices in sorted(by_size.items()):
            for start in range(0, len(indices), self.settings.batch_size):
                part = indices[start : start + self.settings.batch_size]
                array = np.stack([flat[offsets[i] : offsets[i + 1]].reshape(height, width, 3) for i in part])
                images_B3HW = torch.from_numpy(array).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
                for i, value in zip(part, self._image_bytes(images_B3HW), strict=True):
                    latents[i] = value
                if self.settings.flip:
                    for i, value in zip(part, self._image_bytes(images_B3HW.flip(3)), strict=True):
                        flipped[i] = value
        return latents, flipped

    def _image_bytes(self, images_B3HW: torch.Tensor) -> list[bytes]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            encoded = self.image_tokenizer.encode(images_B3HW.contiguous())
        return tensor_bytes(encoded.to(torch.bfloat16) if self.settings.kind == "kl" else encoded.to(torch.int32))

    def _captions(self, captions: list[list[str]]) -> tuple[list[list[bytes]], list[list[bytes]] | None, int, list[float]]:
        """(token ids, embeddings or None, captions that were cut, cosines of the int8 form); a caption is encoded once."""
        unique = list(dict.fromkeys(caption for several in captions for caption in several))
        ids, cut = self.text_encoder.tokenize_flagged(unique)
        dtype = np.dtype("<u2" if self.settings.token_dtype == "uint16" else "<i4")
        id_bytes = {caption: np.asarray(row, dtype=dtype).tobytes() for caption, row in zip(unique, ids, strict=True)}
        is_cut = dict(zip(unique, cut, strict=True))
        tokens = [[id_bytes[caption] for caption in several] for several in captions]
        number_cut = sum(is_cut[caption] for several in captions for caption in several)
        if self.settings.text_mode == "tokens":
            return tokens, None, number_cut, []
        states = [state.cpu() for state in self.text_encoder.encode_ids(ids)]
        packed = {c: pack_embedding(state, self.settings.text_dtype) for c, state in zip(unique, states, strict=True)}
        cosines: list[float] = []
        if self.settings.text_dtype == "int8":
            width = self.text_encoder.width
            for caption, state in zip(unique, states, strict=True):
                restored = unpack_embedding(packed[caption], width, "int8").float()
                cosines.extend(torch.nn.functional.cosine_similarity(restored, state.float(), dim=1).tolist())
        return tokens, [[packed[caption] for caption in several] for several in captions], number_cut, cosines
