"""Draw scenes of coloured shapes with captions into image-text shards; some pairs of colour and shape are held out.

    python pipelines/prepare_shapes.py --config configs/demo.yaml

fluid_core/data/shapes.py has the scenes, the captions and the exact checker.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from fluid_core.config import Recipe
from fluid_core.data import shapes
from fluid_core.data.shard_writer import require_disk, write_shards
from fluid_core.entry import run_pipeline
from fluid_core.workflow.stage import Stage, file_sha256, write_json_atomic


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    section = recipe.data.shapes
    if section is None:
        raise ValueError("the recipe has no data.shapes section: add `shapes: {output: FOLDER}` under data")
    image_size = recipe.data.image_size
    shapes.cell_side(image_size)
    drawn = [shapes.COLOURS, shapes.SHAPES, shapes.HELDOUT, shapes.CATEGORY_SHARES, shapes.NUMBERS, shapes.VALIDATION_SHARE]
    stage = Stage(recipe, "prepare_shapes", config=[section, image_size, recipe.seed, *drawn])
    if stage.skip(args.force):
        return
    counts = {"train": section.train_scenes, "validation": section.validation_scenes, "heldout": section.validation_scenes}
    require_disk(section.output, sum(counts.values()) * (4096 + image_size**2 // 4))
    root = Path(section.output)
    shards = []
    for split, number in counts.items():
        scenes = shapes.samples(split, number, image_size, recipe.seed)
        bar = tqdm(scenes, total=number, desc=f"drawing shapes: {split}", unit="scene")
        shards += write_shards(bar, root / split, section.samples_per_shard)
    path = root / "splits.json"
    index = {
        "source": "shapes",
        "image_size": image_size,
        "counts": counts,
        "heldout_pairs": [" ".join(pair) for pair in shapes.HELDOUT],
        "shards": {str(shard.relative_to(root)): file_sha256(shard) for shard in shards},
    }
    write_json_atomic(path, index)
    stage.finish([path, *(root / split for split in counts)], counts=counts, output_digest=file_sha256(path))
    listed = ", ".join(f"{number} {split}" for split, number in counts.items())
    print(f"prepare_shapes: {sum(counts.values())} scenes in {root}: {listed}")


if __name__ == "__main__":
    run_pipeline(main, __doc__)
