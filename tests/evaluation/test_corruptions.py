"""Corruptions: what each does to an image, and that it does the same again."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from tf_lyapunov.evaluation.corruptions import CORRUPTIONS, SEVERITIES, blur, corrupt, sampling
from tf_lyapunov.evaluation.corruptions.weather import ice_texture, plasma


@pytest.fixture(scope="module")
def images():
    """Smooth images with edges, 32 × 32 × 3, in [0, 1]."""
    rng = np.random.default_rng(0)
    x = gaussian_filter(rng.random((64, 32, 32, 3)), (0, 2, 2, 0))
    x = (x - x.min()) / (x.max() - x.min())
    x[:, 8:20, 10:22] = 1 - x[:, 8:20, 10:22]
    return x.astype(np.float32)


# Mean and standard deviation of the change at severities 1 and 5, as measured on `images`.
EFFECT = {
    "gaussian_noise": ((1, 0.0002, 0.0399), (5, -0.0003, 0.0998)),
    "shot_noise": ((1, 0.0000, 0.0324), (5, -0.0006, 0.1024)),
    "impulse_noise": ((1, -0.0002, 0.0513), (5, -0.0021, 0.1344)),
    "defocus_blur": ((1, 0.0000, 0.0030), (5, 0.0000, 0.0231)),
    "glass_blur": ((1, 0.0000, 0.0565), (5, 0.0000, 0.0635)),
    "motion_blur": ((1, -0.0001, 0.0224), (5, -0.0005, 0.0513)),
    "zoom_blur": ((1, -0.0006, 0.0271), (5, -0.0026, 0.0518)),
    "snow": ((1, 0.0468, 0.0346), (5, 0.2270, 0.0764)),
    "frost": ((1, 0.0457, 0.0363), (5, -0.0279, 0.0843)),
    "fog": ((1, -0.0173, 0.0362), (5, -0.0614, 0.1288)),
    "brightness": ((1, 0.0434, 0.0072), (5, 0.2554, 0.0478)),
    "contrast": ((1, 0.0000, 0.0252), (5, 0.0000, 0.0858)),
    "elastic_transform": ((1, 0.0011, 0.0779), (5, 0.0002, 0.0454)),
    "pixelate": ((1, 0.0002, 0.0162), (5, 0.0015, 0.0238)),
    "jpeg_compression": ((1, 0.0000, 0.0348), (5, -0.0001, 0.0507)),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_effect_of_every_corruption_is_pinned(images, name):
    for severity, mean, deviation in EFFECT[name]:
        change = corrupt(images, name, severity) - images
        assert np.isclose(change.mean(), mean, atol=2e-3), (severity, change.mean())
        assert np.isclose(change.std(), deviation, rtol=0.03, atol=1e-3), (severity, change.std())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 28, 28, 1), (2, 9, 14, 3)])
def test_every_shape_of_image_keeps_its_shape_and_bounds(name, shape):
    x = np.random.default_rng(1).uniform(-0.5, 0.5, shape)
    for severity in SEVERITIES:
        y = corrupt(x, name, severity, bounds=(-0.5, 0.5))
        assert y.shape == shape and y.dtype == np.float32
        assert np.all(np.isfinite(y)) and y.min() >= -0.5 and y.max() <= 0.5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_seed_gives_the_same_images_and_bounds_only_scale_them(images, name):
    x = images[:4]
    first = corrupt(x, name, 3, seed=5)
    assert np.array_equal(first, corrupt(x, name, 3, seed=5))
    scaled = corrupt(2 * x - 1, name, 3, bounds=(-1, 1), seed=5)
    # One step of an 8-bit image where the two roundings of the input differ.
    tolerance = 1 / 255 if name in ("jpeg_compression", "pixelate") else 1e-3
    close = np.abs(scaled - (2 * first - 1)) <= 2 * tolerance
    assert close.mean() > 0.99


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in CORRUPTIONS
        if n
        not in (
            "defocus_blur",
            "zoom_blur",
            "brightness",
            "contrast",
            "pixelate",
            "jpeg_compression",
        )
    ],
)
def test_random_corruptions_differ_by_seed_and_by_image(images, name):
    same = np.broadcast_to(images[:1], (2, *images.shape[1:]))
    first = corrupt(same, name, 3, seed=0)
    assert not np.array_equal(first, corrupt(same, name, 3, seed=1))
    assert not np.array_equal(first[0], first[1])


def test_a_longer_data_set_begins_like_a_shorter_one():
    x = np.full((300, 8, 8, 1), 0.5)
    assert np.array_equal(
        corrupt(x, "gaussian_noise", 1)[:256], corrupt(x[:256], "gaussian_noise", 1)
    )


def test_a_constant_image_is_changed_by_no_blur():
    x = np.full((2, 16, 16, 3), 0.25, np.float32)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform",
                 "pixelate", "contrast"):  # fmt: skip
        # 0.25 is no multiple of 1/255, which the 8-bit one rounds to.
        tolerance = 0.5 / 255 if name == "pixelate" else 16 * np.finfo(np.float32).eps
        assert np.allclose(corrupt(x, name, 5), 0.25, atol=tolerance + 1e-7, rtol=0), name


def test_the_disk_of_radius_zero_point_three_is_the_small_gaussian():
    kernel = blur.disk_kernel(0.3, 0.4)
    weight = np.exp(-1 / (2 * 0.4**2)) / (1 + 2 * np.exp(-1 / (2 * 0.4**2)))
    assert np.isclose(kernel.sum(), 1) and np.isclose(kernel[0, 1], weight * (1 - 2 * weight))


def test_bilinear_sampling_agrees_with_scipy():
    from scipy.ndimage import map_coordinates

    rng = np.random.default_rng(3)
    x, places = rng.random((1, 9, 7, 1)), rng.uniform(-6, 15, (2, 1, 9, 7))
    expected = map_coordinates(x[0, ..., 0], places[:, 0], order=1, mode="reflect")
    found = sampling.bilinear(x, *places)[0, ..., 0]
    assert np.allclose(found, expected, atol=32 * np.finfo(np.float32).eps)


def test_zoom_agrees_with_scipy():
    from scipy.ndimage import zoom

    x = np.random.default_rng(4).random((1, 32, 32, 3)).astype(np.float32)
    kept = int(np.ceil(32 / 1.21))
    top = (32 - kept) // 2
    large = zoom(x[0, top : top + kept, top : top + kept], (1.21, 1.21, 1), order=1)
    trim = (large.shape[0] - 32) // 2
    expected = large[trim : trim + 32, trim : trim + 32]
    assert np.allclose(sampling.zoomed(x, 1.21)[0], expected, atol=1e-5)


def test_textures_and_clouds_use_the_whole_range():
    ice = ice_texture(0, 256)
    assert ice.min() == 0 and ice.max() == 1 and 0.1 < ice.mean() < 0.6
    cloud = plasma(3, 32, 2.0, np.random.default_rng(0))
    assert np.all(cloud.min(axis=(1, 2)) == 0) and np.all(cloud.max(axis=(1, 2)) == 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((1, 8, 8, 1)), "rain", 1), "Unknown corruption.*Known: gaussian_noise"),
        ((np.zeros((1, 8, 8, 1)), "fog", 6), "1, 2, 3, 4 or 5"),
        ((np.zeros((1, 8)), "fog", 1), "need images"),
        ((np.zeros((1, 8, 8, 2)), "fog", 1), "need images"),
        ((np.zeros((1, 4, 4, 1)), "fog", 1), "8 × 8"),
        ((np.full((1, 8, 8, 1), np.nan), "fog", 1), "NaN"),
        ((np.full((1, 8, 8, 1), 255.0), "fog", 1), "255"),
    ],
)
def test_what_is_no_image_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt(*arguments)
