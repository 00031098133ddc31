"""Normalising uint8 pixels gives what transformers' processors give, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from mmprep.errors import InvalidRequest
from mmprep.items import ItemMeta, Normalization, Plan, lay_out, region_size
from mmprep.tensors import arrays, normalization_table, normalized

#: Mean and deviation of CLIP's, ImageNet's and SigLIP's processors.
CONSTANTS = [
    ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
]


def meta(shape, constants, dtype="uint8"):
    return ItemMeta("image", Plan(()), lay_out([("pixels", dtype, shape, "flat", False)]), {}, constants)


def reference(image, scale, mean, std):
    """Return ``image``, of shape (height, width, 3) in uint8, as transformers' PIL backend normalises it."""
    from transformers.image_transforms import normalize, rescale

    return normalize(
        rescale(image, scale, input_data_format="channels_last"), mean, std, input_data_format="channels_last"
    )


@pytest.mark.parametrize(("mean", "std"), CONSTANTS)
@pytest.mark.parametrize("scale", [1 / 255, 0.00392156862745098, 1 / 127.5])
def test_every_value_of_every_channel_equals_transformers_to_the_bit(mean, std, scale):
    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    expected = reference(values, scale, mean, std)[:, 0, :].T
    table = normalization_table(scale, mean, std)
    assert table.dtype == expected.dtype == np.float32
    assert table.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_channels_in_runs_of_the_last_dimension_are_normalised_each_by_its_own_constants():
    mean, std = CONSTANTS[0]
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)
    rows = image.transpose(0, 2, 1).reshape(5, 24)
    constants = Normalization("pixels", 1 / 255, mean, std, 8)
    found = normalized(meta((5, 24), constants), {"pixels": rows})["pixels"]
    expected = reference(image, 1 / 255, mean, std).transpose(0, 2, 1).reshape(5, 24)
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_channels_in_the_first_dimension_are_normalised_each_by_its_own_constants():
    mean, std = CONSTANTS[1]
    image = np.random.default_rng(2).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    constants = Normalization("pixels", 1 / 255, mean, std, 0)
    found = normalized(meta((3, 6, 7), constants), {"pixels": image.transpose(2, 0, 1)})["pixels"]
    expected = reference(image, 1 / 255, mean, std).transpose(2, 0, 1)
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_the_other_fields_are_passed_on_and_the_pixels_are_left_as_they_were():
    constants = Normalization("pixels", 1 / 255, *CONSTANTS[2], 4)
    pixels, grid = np.full((2, 12), 255, np.uint8), np.ones(3, np.int64)
    found = normalized(meta((2, 12), constants), {"pixels": pixels, "grid": grid})
    assert found["grid"] is grid
    assert (found["pixels"] == 1.0).all()
    assert (pixels == 255).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pixels_that_are_floats_cannot_be_normalised_again(dtype):
    constants = Normalization("pixels", 1 / 255, *CONSTANTS[2], 4)
    with pytest.raises(InvalidRequest, match="uint8"):
        normalized(meta((2, 12), constants, dtype), {"pixels": np.ones((2, 12), dtype)})


def test_without_known_constants_nothing_can_be_normalised():
    with pytest.raises(InvalidRequest, match="uint8"):
        normalized(meta((2, 12), None), {"pixels": np.ones((2, 12), np.uint8)})
    with pytest.raises(InvalidRequest):
        normalized(meta((2, 12), Normalization("other", 1.0, (), (), 1)), {"pixels": np.ones((2, 12), np.uint8)})


def test_arrays_lie_over_the_region_without_a_copy():
    described = meta((2, 12), None)
    region = bytearray(region_size(described.fields))
    found = arrays(described, memoryview(region))["pixels"]
    region[13] = 9
    assert found[1, 1] == 9
