"""The pictures of a chaos run: what they must become is known without the service, and a wrong byte is noticed."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from mmprep import embedded
from mmprep.chaos import pictures

LARGE = next(n for n in range(pictures.REUSED, 1000) if pictures.picture(n).tokens > 1000)


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(embedded.path())


def fields_of(which):
    grid = np.array([1, 2 * which.down, 2 * which.across])
    return {"pixel_values": pictures.patches(which).copy(), "image_grid_thw": grid}


@pytest.mark.parametrize("number", [0, 1, 17, 95, 12345, LARGE])
def test_the_expected_patches_are_those_of_transformers_processor(processor, number):
    which = pictures.picture(number)
    picture = Image.open(io.BytesIO(pictures.png(which)))
    processed = processor(images=[picture], return_tensors="np", do_rescale=False, do_normalize=False)
    assert np.array_equal(processed["pixel_values"], pictures.patches(which))
    assert processed["image_grid_thw"].tolist() == [[1, 2 * which.down, 2 * which.across]]


def test_the_same_number_is_the_same_picture_and_another_one_differs_in_nearly_every_byte():
    first, second = (pictures.Picture(number, 5, 5) for number in (1, 2))
    assert pictures.png(first) == pictures.png(first)
    assert np.mean(pictures.patches(first) == pictures.patches(second)) < 0.02


def test_right_tensors_have_no_wrong_byte():
    which = pictures.picture(3)
    assert pictures.wrong_bytes(which, fields_of(which)) == 0


def test_every_wrong_byte_is_counted():
    which = pictures.picture(3)
    fields = fields_of(which)
    fields["pixel_values"][7, 70:73] ^= 1
    fields["image_grid_thw"][0] += 1
    assert pictures.wrong_bytes(which, fields) == 3 + 1


def test_tensors_that_are_missing_or_of_another_form_or_too_many_count_whole():
    which = pictures.picture(3)
    fields = fields_of(which)
    pixels = fields.pop("pixel_values")
    assert pictures.wrong_bytes(which, fields) == pixels.nbytes
    assert pictures.wrong_bytes(which, {**fields, "pixel_values": pixels[1:]}) == pixels.nbytes
    assert pictures.wrong_bytes(which, {**fields, "pixel_values": pixels.astype(np.int16)}) == pixels.nbytes
    assert pictures.wrong_bytes(which, {**fields, "pixel_values": pixels, "more": pixels}) == pixels.nbytes


def test_a_broken_picture_has_a_header_and_cannot_be_decoded():
    which = pictures.picture(3)
    picture = Image.open(io.BytesIO(pictures.broken_png(which)))
    assert picture.size == (28 * which.across, 28 * which.down)
    with pytest.raises(OSError, match="truncated"):
        picture.load()
