"""The two heavy operators: read, filter and decode (CPU tasks), and encode (actors that hold the VAE and T5)."""

import errno
import functools
import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from fluid_core.data.decode import BadImage, DroppedImage, decode_image
from fluid_core.data.filters import OptOut, SampleFilter, image_sha256
from fluid_core.data.plan import PlannedShard
from fluid_core.data.reader import read_shard
from fluid_core.data.samples import Rejected
from fluid_core.data.storage import TransientError, open_storage
from fluid_core.encoding.chunks import DecodedChunk, Dropped, EncodedChunk, SampleRecord
from fluid_core.encoding.duplicates import dropped_name
from fluid_core.encoding.scratch import no_space, scratch_folder
from fluid_core.encoding.settings import EncodeSettings, encoder_folder
from fluid_core.latents.text import pack_embedding, unpack_embedding
from fluid_core.latents.writer import null_text, tensor_bytes


class ReadDecode:
    """One shard in, chunks of decoded samples out, in the shard's order. Runs as Ray Data tasks."""

    def __init__(self, settings: EncodeSettings):
        self.settings = settings
        # Read where the run is started, and sent along: the list need not lie on the workers' machines.
        self.filter = SampleFilter(settings.filters, OptOut.read(settings.filters.opt_out))

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        torch.set_num_threads(1)
        freeze_imports()
        for text in batch["work"]:
            yield from self.chunks(json.loads(text))

    def chunks(self, work: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        shard = PlannedShard(**work["shard"])
        chunk, pixels = DecodedChunk(work["shard"], work["output"], 0, last=False), []
        scratch: Path | None = None
        try:
            scratch = scratch_folder("fluid-read-", self.settings.scratch)
            duplicates = _duplicates(work) if self.settings.filters.deduplicate else set()
            for decoded in self._samples(shard, scratch, duplicates):
                if isinstance(decoded, Dropped):
                    chunk.dropped.append(decoded)
                else:
                    chunk.samples.append(decoded[0])
                    pixels.append(decoded[1])
                if len(chunk.samples) == self.settings.chunk_samples:
                    yield chunk.to_row(pixels)
                    chunk, pixels = DecodedChunk(work["shard"], work["output"], chunk.sequence + 1, last=False), []
            chunk.last = True
        except (ValueError, PermissionError, FileNotFoundError) as error:
            chunk.failure = {"kind": "fatal", "message": str(error)}
        except TransientError as error:
            chunk.failure = {"kind": "passing", "message": str(error)}
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            chunk.failure = {"kind": "fatal", "message": no_space(scratch or self.settings.scratch)}
        finally:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
        yield chunk.to_row(pixels)

    def _samples(
        self, shard: PlannedShard, scratch: Path, duplicates: set[int]
    ) -> Iterator[Dropped | tuple[SampleRecord, NDArray[np.uint8]]]:
        options = self.settings.decode
        for position, sample in enumerate(read_shard(shard, scratch, self.settings.caption_fields)):
            if isinstance(sample, Rejected):
                yield Dropped(sample.key, "quarantined", sample.reason, sample.detail, sample.sha256)
                continue
            sha256 = image_sha256(sample.image)
            reason = "duplicate" if position in duplicates else self.filter.reason(sample, sha256)
            if reason is not None:
                yield Dropped(sample.key, "filtered", reason, "", sha256)
                continue
            try:
                image = decode_image(sample.image, options)
            except BadImage as error:
                yield Dropped(sample.key, "quarantined", error.reason, error.detail, sha256)
            except DroppedImage as error:
                yield Dropped(sample.key, "filtered", error.reason, "", sha256)
            else:
                metadata = json.dumps(sample.metadata, ensure_ascii=False, sort_keys=True)
                size = (image.pixels_HW3.shape[0], image.pixels_HW3.shape[1])
                record = SampleRecord(
                    sample.key, sha256, sample.captions, image.width, image.height, image.crop, metadata, size
                )
                yield record, image.pixels_HW3


def _duplicates(work: dict[str, Any]) -> set[int]:
    """Positions (in reading order) of samples whose image occurs earlier in the run."""
    data = open_storage(work["output"]).read_or_none(dropped_name(work["shard"]["id"]))
    return set(np.frombuffer(data or b"", dtype="<i8").tolist())


@functools.cache
def freeze_imports() -> None:
    """Once a process: what its imports made is no garbage. Walking it (half a million objects) would cost the collector as
    much time as decoding a few thousand images."""
    gc.freeze()


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


def auto_threads(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)
