"""Filters that need no pixels."""

import pytest

from fluid_core.config.data import FilterConfig, MetadataThreshold
from fluid_core.data.filters import OptOut, SampleFilter, resolve_preset
from fluid_core.data.samples import RawSample

NOBODY = OptOut(frozenset())


def reason(captions: list[str], metadata: dict | None = None, opt_out: OptOut = NOBODY, **config) -> str | None:
    sample = RawSample("k", b"x", captions, metadata or {})
    return SampleFilter(FilterConfig(**config), opt_out).reason(sample, "hash")


def test_caption_rules():
    assert reason(["one two"], min_caption_words=2) is None
    assert reason(["one"], min_caption_words=2) == "caption_too_few_words"
    assert reason(["abc"], min_caption_chars=4) == "caption_too_short"
    assert reason(["abcde"], max_caption_chars=4) == "caption_too_long"
    assert reason(["12345 ab"], min_ascii_letters=0.5) == "caption_characters"
    assert reason(["IMG_1234"], caption_pattern=r"^(?!IMG_)") == "caption_pattern"
    with pytest.raises(ValueError, match="regular expression"):
        FilterConfig(caption_pattern="(")


def test_a_refused_caption_goes_and_the_others_stay():
    sample = RawSample("k", b"x", ["x", "a long enough one", "y"], {})
    assert SampleFilter(FilterConfig(min_caption_words=2), NOBODY).reason(sample, "") is None
    assert sample.captions == ["a long enough one"]


@pytest.mark.parametrize(
    "value, expected", [(0.2, None), (0.7, "threshold_p"), ("0.2", None), (float("nan"), "missing_p"), (None, "missing_p")]
)
def test_thresholds(value, expected):
    assert reason(["x"], {"p": value}, thresholds=[MetadataThreshold(column="p", maximum=0.5, missing="drop")]) == expected


def test_missing_column_policies():
    beyond_float = {"p": 10**400}
    assert reason(["x"], beyond_float, thresholds=[MetadataThreshold(column="p", minimum=1, missing="drop")]) == "missing_p"
    assert reason(["x"], thresholds=[MetadataThreshold(column="p", minimum=1, missing="keep")]) is None
    with pytest.raises(ValueError, match="missing: keep"):
        reason(["x"], thresholds=[MetadataThreshold(column="p", minimum=1)])
    with pytest.raises(ValueError, match="neither"):
        MetadataThreshold(column="p")


def test_opt_out(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# note\n\nhash\n")
    assert reason(["x"], opt_out=OptOut.read(str(path))) == "opt_out"
    assert reason(["x"], {"url": "u"}, OptOut(frozenset({"u"}))) == "opt_out"
    assert reason(["x"], {"URL": "u"}, OptOut(frozenset({"u"}))) == "opt_out"
    assert reason(["x"], {"url": ["u"]}, OptOut(frozenset({"u"}))) is None
    assert reason(["x"], opt_out=OptOut(frozenset({"k"}))) == "opt_out"
    with pytest.raises(ValueError, match="does not exist"):
        OptOut.read(str(tmp_path / "gone"))


def test_datacomp_basic_keeps_stricter_settings():
    config = resolve_preset(FilterConfig(preset="datacomp_basic", min_side=300, max_aspect=2.0))
    assert (config.min_side, config.max_aspect, config.min_caption_words, config.min_caption_chars) == (300, 2.0, 3, 6)
