"""Panels whose pixels are the maps' numbers, and pages of what they should be of."""

import jax
import numpy as np
import pytest

from zoo import panels, pictures
from zoo.watch import ChannelMap, DenseMap, RoutedMap, WindowMap


def window_map():
    """The query at (1, 5) of 4 x 8 tokens is in the upper right of two by two windows of 2 x 4; one query."""
    weights = np.zeros((1, 4, 1, 8, 8), np.float32)
    weights[0, 1, 0, 5] = np.arange(8) / 28
    return WindowMap(weights, (4, 8), (2, 4), "block")


def test_a_panel_shows_the_numbers():
    """Pixels in the middle of every token: grey out of reach, in the scale's colours within it."""
    pixels = np.full((160, 320, 3), (200, 100, 50), np.uint8)
    frame = panels.Frame(pixels, 320, (0.3, 0.7))
    assert frame.size == (320, 160) and frame.token_on((4, 8)) == (1, 5)
    image, scale = panels.heat(window_map(), 0, frame)
    assert scale == (0.0, pytest.approx(0.25))
    middle = np.asarray(image, int)[20::40, 20::40]
    inside = np.zeros((4, 8), bool)
    inside[:2, 4:] = True
    assert (np.ptp(middle[~inside], axis=-1) == 0).all() and (np.ptp(middle[inside], axis=-1) > 0).all()
    brightness = middle.sum(-1)[:2, 4:].reshape(-1)
    assert (np.diff(brightness) > 0).all()
    strongest = panels.colour_map(np.array(1.0))
    assert np.abs(middle[1, 7] - strongest).max() < 30


def test_a_small_reach_is_magnified():
    weights = np.full((1, 16, 1, 4, 4), 0.25, np.float32)
    frame = panels.Frame(np.full((160, 160, 1), 99, np.uint8), 160, (0.0, 0.0))
    image, _ = panels.heat(WindowMap(weights, (8, 8), (2, 2), "block"), 0, frame)
    coloured = np.ptp(np.asarray(image, int), axis=-1) > 0
    # The window of 40 x 40 pixels itself, and in the opposite corner 0.42 of the side.
    assert coloured[20, 30] and coloured[120, 120] and not coloured[60, 60] and not coloured[30, 120]


def test_the_query_is_not_hidden():
    """Both at opposite corners: what is magnified goes to a third one."""
    weights = np.full((1, 16, 1, 4, 4), 0.25, np.float32)
    found = RoutedMap(weights, np.full((1, 16, 1), 15), (8, 8), (4, 4), (2, 2), (2, 2))
    frame = panels.Frame(np.full((160, 160, 1), 99, np.uint8), 160, (0.0, 0.0))
    image, _ = panels.heat(found, 0, frame)
    coloured = np.ptp(np.asarray(image, int), axis=-1) > 0
    assert coloured[130, 130] and not coloured[40, 40]
    assert coloured[30, 120] != coloured[120, 30]


def test_colours_are_the_named_maps():
    np.testing.assert_array_equal(panels.colour_map(np.array([0.0, 1.0])), [[0, 0, 4], [252, 255, 164]])
    np.testing.assert_array_equal(panels.colour_map(np.array([0.0]), panels.VIRIDIS), [[68, 1, 84]])
    for colours in (panels.INFERNO, panels.VIRIDIS):
        # Brighter all the way, also to eyes that see no colours.
        light = panels.colour_map(np.linspace(0, 1, 100), colours) @ np.array([0.2126, 0.7152, 0.0722])
        assert (np.diff(light) > 0).all()


def test_pages_of_the_last_blocks():
    window, channels = window_map(), ChannelMap(np.ones((1, 3, 2, 2)), np.random.default_rng(0).random((1, 4, 8, 3)))
    dense = DenseMap(np.full((1, 2, 32, 32), 1 / 32, np.float32), (4, 8))
    maps = {
        "stages_10_0/attention": dense,
        "stages_2_0/spatial": window,
        "stages_2_11/spatial": window,
        "stages_2_11/channel": channels,
        "head/attention": dense,
    }
    last = pictures.last_blocks(maps)
    assert list(last) == ["stages_10_0/attention", "stages_2_11/spatial", "stages_2_11/channel"]
    subject = pictures.Subject(np.zeros((64, 128, 3), np.uint8))
    page = pictures.attention_page([subject, subject], {p: jax.tree.map(twice, m) for p, m in maps.items()}, title="x")
    assert page.size[0] == 1600
    with pytest.raises(ValueError, match="nothing to draw"):
        pictures.attention_page([subject], {"head/attention": dense}, title="x")
    with pytest.raises(ValueError, match="both from 0 to 1"):
        pictures.attention_page([subject], maps, title="x", token=(0.0, 1.2))


def twice(array):
    return np.concatenate([array, array])


def test_names_of_kinds():
    routed = RoutedMap(np.ones((1, 4, 2, 2, 4)), np.zeros((1, 4, 2), int), (2, 4), (2, 2), (1, 2), (1, 2))
    assert pictures.kind_of(routed) == "routed to 2 of 4 regions, 2 heads"
    assert pictures.kind_of(window_map()) == "window 2 x 4, 1 head"
    assert pictures.kind_of(ChannelMap(None, np.zeros((1, 2, 2, 1)))) == "1 channel group"
    with pytest.raises(TypeError, match="must be a map of zoo.attention_maps, got int"):
        pictures.kind_of(3)
