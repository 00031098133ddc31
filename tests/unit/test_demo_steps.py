"""Each check of the demonstration holds for what is right, and fails for what is wrong."""

import copy
import io

import numpy as np
import pytest

from mmprep import embedded
from mmprep.demo import steps
from mmprep.demo.backend import differences, reference
from mmprep.demo.page import Check, Page

IMAGE = 6156


def answer(*, lease="a", ranges=((1, 4), (6, 2))):
    """Return an answer for two pictures, of 4 and 2 tokens, as the service gives it."""
    ids = [1, IMAGE, IMAGE, IMAGE, IMAGE, 2, IMAGE, IMAGE, 3]
    addresses = [
        {
            "segment": "/mmprep-0-1-2",
            "epoch": "0" * 32,
            "slot": slot,
            "offset": 4096 * slot,
            "length": 4096,
            "generation": slot + 1,
            "lease": f"{lease}{slot}",
        }
        for slot in range(2)
    ]
    placeholders = [{"offset": offset, "length": length} for offset, length in ranges]
    return {
        "token_ids": ids,
        "features": {
            "mm_hashes": {"image": ["1" * 64, "2" * 64]},
            "mm_placeholders": {"image": placeholders},
            "mm_addresses": {"image": addresses},
        },
    }


def failed(checks):
    return [check.subject for check in checks if not check.ok]


def test_a_right_prompt_passes():
    assert failed(steps.prompt(answer(), 2, IMAGE)) == []


@pytest.mark.parametrize(
    ("ranges", "subjects"),
    [
        (((1, 3), (6, 2)), ["expansion"]),  # an image token outside
        (((1, 5), (6, 2)), ["expansion"]),  # another token inside
        (((6, 2), (1, 4)), ["ranges"]),  # out of order
        (((1, 4),), ["ranges", "expansion"]),  # a picture without its range
    ],
)
def test_a_prompt_whose_ranges_are_wrong_fails(ranges, subjects):
    assert failed(steps.prompt(answer(ranges=ranges), 2, IMAGE)) == subjects


def test_an_answer_without_media_fails():
    assert failed(steps.prompt({"token_ids": [1], "features": None}, 2, IMAGE)) == ["ranges"]


def test_a_second_answer_that_names_the_same_places_under_leases_of_its_own_passes():
    assert failed(steps.same_answer(answer(), answer(lease="b"))) == []


def test_a_second_answer_with_another_prompt_or_hash_fails():
    second = answer(lease="b")
    second["token_ids"][0] = 9
    assert failed(steps.same_answer(answer(), second)) == ["second answer"]
    second = answer(lease="b")
    second["features"]["mm_hashes"]["image"][1] = "3" * 64
    assert failed(steps.same_answer(answer(), second)) == ["second answer"]


@pytest.mark.parametrize("part", ["segment", "epoch", "slot", "offset", "length", "generation"])
def test_a_second_answer_that_names_another_place_fails(part):
    second = answer(lease="b")
    second["features"]["mm_addresses"]["image"][1][part] = "other"
    assert failed(steps.same_answer(answer(), second)) == ["same places"]


def test_a_second_answer_that_shares_the_leases_of_the_first_fails():
    assert failed(steps.same_answer(answer(), answer())) == ["leases"]


def compared(**changed):
    item = {"fields": {"pixel_values": ["float32", [16, 1176]]}, "grid": [1, 4, 4], "differences": []}
    return [{**item, **changed}, {**item, "grid": [1, 2, 4]}]


def test_tensors_equal_to_the_reference_pass():
    assert failed(steps.tensors(["one", "two"], answer(), compared(), "Processor")) == []


def test_tensors_that_differ_or_do_not_fit_their_range_fail():
    checks = steps.tensors(["one", "two"], answer(), compared(differences=["pixel_values differs"]), "Processor")
    assert failed(checks) == ["one"]
    assert checks[0].finding == "pixel_values differs"
    assert failed(steps.tensors(["one", "two"], answer(), compared(grid=[1, 4, 2]), "Processor")) == ["one"]


def test_only_a_shared_mapping_that_cannot_be_written_passes():
    line = "7f00-7f01 {} 00000000 00:17 42   /dev/shm/mmprep-0-1-2\n7f01-7f02 rw-p 00000000 00:00 0 [heap]\n"
    assert steps.mapping(line.format("r--s"), "/mmprep-0-1-2").ok
    assert not steps.mapping(line.format("rw-s"), "/mmprep-0-1-2").ok
    assert not steps.mapping(line.format("r--s"), "/mmprep-0-1-3").ok


def test_the_counters_must_show_each_picture_found_once():
    def samples(queries, hits):
        return {
            'mmprep_mm_cache_queries_total{modality="image"}': queries,
            'mmprep_mm_cache_hits_total{modality="image"}': hits,
        }

    assert failed(steps.counters({}, samples(4.0, 2.0), 2)) == []
    assert failed(steps.counters(samples(6.0, 6.0), samples(10.0, 8.0), 2)) == []
    assert failed(steps.counters({}, samples(4.0, 0.0), 2)) == ["cache"]
    assert failed(steps.counters({}, {}, 2)) == ["cache"]


def test_the_reference_of_another_photograph_differs_and_its_own_does_not():
    name, (cat, rocket) = reference(embedded.path(), embedded.photos())
    assert name == "Qwen2VLImageProcessorPil"
    assert differences(cat, cat) == []
    assert differences(rocket, cat) == [
        "pixel_values has the shape (1564, 1176), not (1008, 1176)",
        "image_grid_thw differs in 2 of 3 values",
    ]


def test_one_bit_one_dtype_or_one_field_makes_a_difference():
    expected = {"pixel_values": np.zeros((2, 3), np.float32)}
    changed = copy.deepcopy(expected)
    changed["pixel_values"][1, 1] = np.nextafter(np.float32(0), np.float32(1))
    assert differences(changed, expected) == ["pixel_values differs in 1 of 6 values"]
    assert differences({"pixel_values": np.zeros((2, 3))}, expected) == ["pixel_values is float64, not float32"]
    assert differences({}, expected) == ["the fields are , not pixel_values"]
    assert differences({"pixel_values": -expected["pixel_values"]}, expected) != []


def test_the_page_counts_what_failed_and_says_so_plainly():
    stream = io.StringIO()
    page = Page(stream)
    page.checks([Check(True, "one", "is right"), Check(False, "two", "is wrong")])
    assert page.failed == 1
    assert stream.getvalue().splitlines() == ["  ok    one              is right", "  FAILEDtwo              is wrong"]
