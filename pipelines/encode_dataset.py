"""Image-text shards to an encoded data set: VAE moments and T5 embeddings as Parquet, exactly once, nothing lost in silence.

    python pipelines/encode_dataset.py --config configs/encode_local.yaml \\
        --set data.sources='["DIR/*.tar"]' --set encode.output=OUT

Kill it at will and run it again: it goes on with the missing shards. `fluid inspect OUT` tells what came out.
Exit code 0 when every sample is accounted for.
"""

import argparse

from fluid_core.config import Recipe
from fluid_core.entry import run_pipeline


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    from fluid_core.encoding.pipeline import encode_dataset

    encode_dataset(recipe, force=args.force)


if __name__ == "__main__":
    run_pipeline(main, __doc__)
