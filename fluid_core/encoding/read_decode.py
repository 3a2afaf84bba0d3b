"""The first heavy operator: read, filter and decode, as tasks on CPUs.

Nothing here imports torch: each decode worker is a process of its own, and would take 135 MB more, and 1.6 s more to start.
"""

import errno
import functools
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluid_core.data.decode import BadImage, DroppedImage, decode_image
from fluid_core.data.filters import OptOut, SampleFilter, image_sha256
from fluid_core.data.plan import PlannedShard
from fluid_core.data.reader import read_shard
from fluid_core.data.samples import Rejected
from fluid_core.data.storage import TransientError, open_storage
from fluid_core.encoding.chunks import DecodedChunk, Dropped, SampleRecord
from fluid_core.encoding.duplicates import dropped_name
from fluid_core.encoding.scratch import no_space, scratch_folder
from fluid_core.encoding.settings import EncodeSettings


class ReadDecode:
    """One shard in, chunks of decoded samples out, in the shard's order. Runs as Ray Data tasks."""

    def __init__(self, settings: EncodeSettings):
        self.settings = settings
        # Read where the run is started, and sent along: the list need not lie on the workers' machines.
        self.filter = SampleFilter(settings.filters, OptOut.read(settings.filters.opt_out))

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
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
