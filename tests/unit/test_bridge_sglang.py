"""Items in SGLang's forms, held against what its 0.5.23 says of them; no word of the reference is computed here."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mmprep.bridges import sglang
from mmprep.errors import InvalidRequest
from mmprep.item import Inline, Item
from mmprep.items import ItemMeta, Plan, Run, lay_out, region_size

IMAGE_PAD, VIDEO_PAD, TEXT = 6156, 6157, 7

#: The attributes of ``MultimodalDataItem`` in SGLang 0.5.23.
DATA_ITEM = {
    "modality",
    "hash",
    "pad_value",
    "offsets",
    "format",
    "feature",
    "precomputed_embeddings",
    "model_specific_data",
    "identity",
    "pad_values",
}
#: What SGLang 0.5.23 derives from an identity: its hash, and its pad values.
RECORDED = {
    "5cc1bd06d5604d2bce7280702c82f06fe4e6f794f44e2113a1f8a5bd4c8ede22": (
        6683831159041838379,
        (796756515928428294, 1801726283919814725, 2787196211487998431, 3998530541578988857),
    ),
    "00" * 32: (0, (1484253362110568644, 3301934392075651176, 318471819182036349, 2703848712215624371)),
}
CAT, BLACK = RECORDED


def item(digest, grid, offset, *, dtype="float32", runs=None, modality="image"):
    """Return a picture, or a video, of Qwen2-VL's family with tensors of its own."""
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}[modality]
    pad = IMAGE_PAD if modality == "image" else VIDEO_PAD
    rows = int(np.prod(grid))
    fields = lay_out(
        [(names[0], dtype, (rows, 8), "flat", False), (names[1], "int64", (3,), "batched", True)],
    )
    region = bytearray(region_size(fields))
    stored = {"float32": "<f4", "bfloat16": "<u2", "uint8": "u1"}[dtype]
    values = np.arange(rows * 8).astype(stored)
    region[fields[0].offset : fields[0].offset + values.nbytes] = values.tobytes()
    region[fields[1].offset : fields[1].offset + 24] = np.array(grid, "<i8").tobytes()
    plan = Plan(runs or (Run(pad, rows // 4),))
    meta = ItemMeta(modality, plan, fields, {})
    return Item(
        meta,
        Inline(memoryview(region)),
        hash=digest,
        offset=offset,
        length=plan.length,
        cached=False,
        address=None,
        run=None,
    )


def request(*items, length=40):
    """Return a request with the items in their places, and their tensors as arrays."""
    ids = np.full(length, TEXT, np.uint32)
    by_modality = {}
    for one in items:
        ids[one.offset : one.offset + one.length] = one.meta.plan.token_ids()
        by_modality.setdefault(one.modality, []).append(one)
    tensors = {modality: [one.materialize() for one in ones] for modality, ones in by_modality.items()}
    return SimpleNamespace(items=by_modality, token_ids=ids), tensors


@pytest.mark.parametrize(("digest", "derived"), RECORDED.items(), ids=["cat", "zeros"])
def test_hash_and_pad_values_are_those_that_sglang_derives(digest, derived):
    one = item(digest, (1, 4, 6), 5)
    made = sglang.to_mm_item(one, one.materialize())
    if importlib.util.find_spec("sglang") is None:
        assert set(made) == DATA_ITEM
        made = SimpleNamespace(**made)
    assert (made.hash, tuple(made.pad_values), made.pad_value) == (*derived, derived[1][0])
    assert made.identity == bytes.fromhex(digest)
    assert made.offsets == [(5, 10)]  # both ends included
    assert made.feature.shape == (24, 8)
    assert made.precomputed_embeddings is None
    assert {name: value.tolist() for name, value in made.model_specific_data.items()} == {"image_grid_thw": [[1, 4, 6]]}


def test_offsets_are_the_runs_that_take_an_embedding():
    text = Run(TEXT, 3, embed=False)
    runs = (text, Run(VIDEO_PAD, 2), text, Run(VIDEO_PAD, 1), Run(VIDEO_PAD, 1), Run(TEXT, 1, embed=False))
    assert sglang.offsets(item(CAT, (2, 2, 2), 10, runs=runs, modality="video")) == [(13, 14), (18, 19)]
    assert sglang.offsets(item(CAT, (1, 4, 6), 0)) == [(0, 5)]


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="SGLang is installed: it makes objects")
def test_a_request_comes_with_its_items_in_the_prompts_order_and_a_padded_prompt():
    runs = (Run(TEXT, 1, embed=False), Run(VIDEO_PAD, 2))
    video = item(BLACK, (1, 2, 4), 12, runs=runs, modality="video")
    asked, tensors = request(item(CAT, (1, 4, 6), 3), item(BLACK, (1, 2, 2), 20), video)
    output = sglang.to_processor_output(asked, tensors)
    assert output["input_ids"] == asked.token_ids.tolist()
    assert (output["im_token_id"], output["video_token_id"]) == (IMAGE_PAD, VIDEO_PAD)
    assert [(one["modality"], one["offsets"]) for one in output["mm_items"]] == [
        ("IMAGE", [(3, 8)]),
        ("VIDEO", [(13, 14)]),
        ("IMAGE", [(20, 20)]),
    ]
    cat, black = RECORDED[CAT][1], RECORDED[BLACK][1]
    expected = asked.token_ids.tolist()
    expected[3:9] = [*cat, *cat[:2]]
    expected[13:15] = black[:2]
    expected[20] = black[0]
    assert output["padded_input_ids"] == expected


def split_as_sglang(given):
    """Take joined pictures apart by SGLang's rule: one range, and as many rows as its grid has patches, for each."""
    ends = np.cumsum(np.prod(given["image_grid_thw"], axis=-1))
    assert given["image_grid_thw"].shape == (len(given["offsets"]), 3)
    assert ends[-1] == len(given["pixel_values"])
    return [part.tolist() for part in np.split(given["pixel_values"], ends[:-1])]


def test_an_engine_gets_one_dictionary_a_modality_that_it_can_take_apart():
    items = [item(CAT, (1, 4, 6), 3), item(BLACK, (1, 2, 2), 20)]
    asked, tensors = request(*items)
    arguments = sglang.to_engine_arguments(asked, tensors)
    assert set(arguments) == {"input_ids", "image_data"}
    assert arguments["input_ids"] == asked.token_ids.tolist()
    (given,) = arguments["image_data"]
    assert set(given) == {"format", "pixel_values", "image_grid_thw", "offsets"}  # a hash would be that of all of them
    assert (given["format"], given["offsets"]) == ("processor_output", [(3, 8), (20, 20)])
    assert split_as_sglang(given) == [of_item["pixel_values"].tolist() for of_item in tensors["image"]]


def test_the_hash_of_an_only_item_goes_to_the_engine():
    video = item(BLACK, (1, 2, 4), 30, modality="video")
    asked, tensors = request(item(CAT, (1, 4, 6), 3), video)
    arguments = sglang.to_engine_arguments(asked, tensors)
    (picture,), (film,) = arguments["image_data"], arguments["video_data"]
    assert (picture["hash"], film["hash"]) == (RECORDED[CAT][0], RECORDED[BLACK][0])
    assert np.shares_memory(picture["pixel_values"], tensors["image"][0]["pixel_values"])  # nothing is copied
    assert film["video_grid_thw"].tolist() == [[1, 2, 4]]


def test_embedded_pictures_are_precomputed_embeddings():
    fields = lay_out(
        [("image_embeds", "float32", (6, 16), "flat", False), ("image_grid_thw", "int64", (3,), "batched", True)]
    )
    meta = ItemMeta("image", Plan((Run(IMAGE_PAD, 6),)), fields, {})
    region = memoryview(bytearray(region_size(fields)))
    one = Item(meta, Inline(region), hash=CAT, offset=2, length=6, cached=False, address=None, run=None)
    asked, tensors = request(one)
    (given,) = sglang.to_engine_arguments(asked, tensors)["image_data"]
    assert (given["format"], given["feature"].shape, given["offsets"]) == ("precomputed_embedding", (6, 16), [(2, 7)])
    if importlib.util.find_spec("sglang") is None:
        made = sglang.to_mm_item(one, one.materialize())
        assert (made["format"], made["feature"]) == ("PRECOMPUTED_EMBEDDING", None)
        assert made["precomputed_embeddings"].shape == (6, 16)


@pytest.mark.parametrize(("dtype", "advice"), [("uint8", "mm_dtype"), ("bfloat16", "bridges.torch")])
def test_what_sglang_would_take_for_other_numbers_is_refused(dtype, advice):
    asked, tensors = request(item(CAT, (1, 4, 6), 3, dtype=dtype))
    for form in (sglang.to_processor_output, sglang.to_engine_arguments):
        with pytest.raises(InvalidRequest, match=advice):
            form(asked, tensors)


def test_using_it_imports_no_engine_and_no_torch():
    code = "import sys, mmprep.bridges.sglang; print(sorted({'torch', 'sglang', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
def test_sglang_itself_agrees():
    from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs, MultimodalProcessorOutput

    asked, tensors = request(item(CAT, (1, 4, 6), 3), item(BLACK, (1, 2, 2), 20))
    output = sglang.to_processor_output(asked, tensors)
    assert isinstance(output, MultimodalProcessorOutput)
    assert all(isinstance(one, MultimodalDataItem) for one in output.mm_items)
    padded = MultimodalProcessorOutput.build_padded_input_ids(output.input_ids, output.mm_items)
    assert output.padded_input_ids == padded
    inputs = MultimodalInputs.from_processor_output(output)
    assert [one.hash for one in inputs.mm_items] == [RECORDED[CAT][0], RECORDED[BLACK][0]]
