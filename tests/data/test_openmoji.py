from collections import Counter

import numpy as np
import pytest

from fluid_core.data import openmoji


@pytest.fixture(scope="module")
def prepared():
    return openmoji.prepare(openmoji.IDENTITY_SIZE, progress=False)


def test_names_are_clean_and_unique(prepared):
    icons, images = prepared
    assert 3900 < len(icons) < 4100
    assert images.shape == (len(icons), 64, 64, 3)
    captions = {icon.caption: icon for icon in icons}
    assert len(captions) == len(icons)
    assert not any(mark in caption for caption in captions for mark in ":_")
    farmer = captions["woman farmer medium-dark skin tone"]
    assert (farmer.base, farmer.tone, farmer.category) == ("woman farmer", "medium-dark", "tone")
    bald = captions["man light skin tone bald"]
    assert (bald.base, bald.tone) == ("man bald", "light")
    couple = captions["kiss woman man dark skin tone light skin tone"]
    assert (couple.tone, couple.category, couple.split) == ("dark+light", "two_tone", "two_tone")
    assert captions["dark skin tone"].category == "icon"


def test_every_icon_is_in_one_split(prepared):
    icons, _ = prepared
    counts = Counter(icon.split for icon in icons)
    assert set(counts) == set(openmoji.SPLITS)
    assert counts["heldout"] >= 60
    assert counts["validation"] >= 50
    for split in openmoji.SPLITS:
        images = np.zeros((len(icons), 2, 2, 3), np.uint8)
        assert sum(1 for _ in openmoji.samples(icons, images, split)) == counts[split]


def test_heldout_combinations_have_all_their_parts_in_training(prepared):
    icons, _ = prepared
    training = [icon for icon in icons if icon.split == "train"]
    words = {word for icon in training for word in icon.caption.split()}
    bases = Counter(icon.base for icon in training)
    tones = Counter(icon.tone for icon in training)
    pictures = {icon.image_id for icon in training}
    for icon in icons:
        if icon.split in ("heldout", "validation"):
            assert bases[icon.base] >= 3, icon
            assert tones[icon.tone] >= 100, icon
            assert set(icon.caption.split()) <= words
            assert icon.image_id not in pictures, f"{icon.caption}: its very picture is in training"
        if icon.split == "heldout":
            assert icon.tone == "medium-dark"


def test_icons_that_are_one_picture_share_their_id(prepared):
    icons, images = prepared
    by_caption = {icon.caption: index for index, icon in enumerate(icons)}
    for one, other in (("farmer", "man farmer"), ("Norway", "Svalbard & Jan Mayen")):
        assert icons[by_caption[one]].image_id == icons[by_caption[other]].image_id
    assert icons[by_caption["farmer"]].image_id != icons[by_caption["woman farmer"]].image_id
    # Not the same bytes, and the same to the eye: 54 dB apart.
    blond, plain = by_caption["woman medium-light skin tone blond hair"], by_caption["woman medium-light skin tone"]
    assert not np.array_equal(images[blond], images[plain])
    assert icons[blond].image_id == icons[plain].image_id
    exact = {image.tobytes() for image in images}
    assert len({icon.image_id for icon in icons}) <= len(exact)


def test_other_sizes_have_the_same_splits(monkeypatch, prepared):
    icons = prepared[0]
    wanted = [icon for icon in icons if icon.base in ("woman farmer", "farmer", "man farmer", "grinning face", "ear")]
    plain = [openmoji.Icon(icon.key, icon.caption, icon.base, icon.tone) for icon in wanted]
    monkeypatch.setattr(openmoji, "list_icons", lambda: plain)
    small, _ = openmoji.prepare(64, progress=False)
    large, images = openmoji.prepare(512, progress=False)
    assert images.shape[1:] == (512, 512, 3)
    assert small == large
    assert (images[:, 0, 0] == 255).all(), "icons stand on white"


def test_rendering_is_deterministic(prepared):
    icons, images = prepared
    for index in (0, 1000, 3000):
        assert np.array_equal(openmoji.render(icons[index], 64), images[index])
        assert openmoji.encode_png(images[index]) == openmoji.encode_png(images[index].copy())


def test_missing_package_names_the_fix(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValueError, match="pip install resvg-py"):
        openmoji.render(openmoji.list_icons()[0], 64)
