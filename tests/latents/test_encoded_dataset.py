"""The stored form: readable without this project, and refused when it is not what the manifest says."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoding_support import encode_here, make_shards, recipe_values

from fluid_core.config import Recipe
from fluid_core.latents.reader import EncodedDataset, stack_column
from fluid_core.latents.text import pack_embedding, unpack_embedding


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_shards(folder / "data", 2, 11)
    encode_here(Recipe.model_validate(recipe_values(folder, [str(folder / "data")], folder / "out")))
    return folder / "out"


def test_plain_pyarrow_reads_it_as_the_docs_say(root, repository):
    dataset = EncodedDataset(str(root))
    rows = dataset.read_group(0, 1)
    shard = dataset.manifest.shards[0].id
    (snippet,) = re.findall(r"```python\n(.*?)```", (repository / "docs/encoding.md").read_text(), re.S)
    C, H, W = dataset.manifest.latent_shape
    names = {"pyarrow": __import__("pyarrow"), "numpy": np, "C": C, "H": H, "W": W}
    exec(snippet.replace("OUT", str(root)).replace("<shard>", shard).replace('["moments"][0]', '["moments"][8]'), names)
    assert rows.moments is not None
    np.testing.assert_array_equal(names["moments"], rows.moments[0].float().numpy())
    metadata = pq.read_schema(root / f"latents/{shard}.parquet").metadata
    assert metadata[b"fluid.kind"] == b"kl" and metadata[b"fluid.schema_version"] == b"1"


def test_encoded_columns_are_plain_binary(root):
    file = pq.ParquetFile(next((root / "latents").iterdir()))
    group = file.metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert columns["moments"].physical_type == "BYTE_ARRAY" and columns["moments"].compression == "ZSTD"
    assert not any("DICTIONARY" in encoding for encoding in columns["moments"].encodings)


def test_columns_can_be_left_out(root):
    rows = EncodedDataset(str(root)).read_group(1, 0, ["moments"])
    assert rows.moments is not None and rows.text is None and rows.token_ids == [] and len(rows) == 8
    assert rows.moments.dtype == torch.bfloat16


def test_a_dataset_travels_to_other_processes(root):
    copy = pickle.loads(pickle.dumps(EncodedDataset(str(root))))
    assert len(copy) == 22 and copy.read_group(0, 0).keys == EncodedDataset(str(root)).read_group(0, 0).keys


def test_manifest_is_checked(root, tmp_path):
    with pytest.raises(ValueError, match="no manifest"):
        EncodedDataset(str(tmp_path))
    for text, message in (("{", "not valid JSON"), ('{"schema_version": 9}', "schema_version 9")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            EncodedDataset(str(tmp_path))
    values = json.loads((root / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    copy = EncodedDataset(str(tmp_path))
    assert copy.manifest.hash == EncodedDataset(str(root)).manifest.hash
    with pytest.raises(ValueError, match="is missing"):
        copy.read_group(0, 0)


def test_a_column_becomes_a_tensor_without_a_copy():
    values = torch.arange(60, dtype=torch.int16).reshape(6, 10)
    rows = pa.array([row.numpy().tobytes() for row in values], pa.binary())
    whole = stack_column(pa.chunked_array([rows]), torch.int16, (2, 5))
    assert torch.equal(whole, values.view(6, 2, 5)) and whole.data_ptr() == rows.buffers()[2].address
    for column in (pa.chunked_array([rows]).slice(1, 3), pa.chunked_array([rows[1:3], rows[3:4]])):
        assert torch.equal(stack_column(column, torch.int16, (10,)), values[1:4])
    assert stack_column(pa.chunked_array([rows[:0]]), torch.int16, (10,)).shape == (0, 10)


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.01), ("int8", 0.02)])
def test_embeddings_as_bytes(dtype, tolerance):
    states = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    states[3] *= 100  # scales are per token
    packed = pack_embedding(states, dtype)
    assert len(packed) == (7 * 32 * 2 if dtype == "bf16" else 7 * (32 + 4))
    restored = unpack_embedding(packed, 32, dtype).float()
    assert restored.shape == (7, 32)
    assert ((restored - states).abs().amax(1) <= tolerance * states.abs().amax(1)).all()
    assert unpack_embedding(pack_embedding(torch.zeros(1, 32), dtype), 32, dtype).abs().sum() == 0
