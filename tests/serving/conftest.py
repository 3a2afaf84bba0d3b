"""One server for all tests of this folder: a tiny model of random weights behind real Ray Serve and real HTTP."""

from collections.abc import Iterator

import pytest
from serving_support import Server, small_recipe
from tiny_fluid import tiny_pipeline


@pytest.fixture(scope="package")
def server(ray_session: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from fluid_core.serving.app import serving

    folder = tmp_path_factory.mktemp("serving")
    pipeline = tiny_pipeline(folder)
    pipeline.save_pretrained(folder / "bundle")
    recipe = small_recipe(folder, model=str(folder / "bundle"), max_image_side=128)
    with serving(recipe) as (url, _):
        yield Server(url, recipe, pipeline, folder)
