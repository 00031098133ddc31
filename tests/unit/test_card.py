"""In which dtype a modality's tensors come, where requests and the service want one that only another modality has."""

import msgspec
import pytest

from mmprep.card import ItemOptions, ModelCard, Placeholder
from mmprep.errors import InvalidRequest, StartupError
from mmprep_frontend.media.intake import Medium
from mmprep_frontend.process import _check_dtype
from mmprep_frontend.render.conversation import MediaPart
from mmprep_frontend.wanted import wanted as wanted_item

PIXELS = ("uint8", "float32", "bfloat16", "float16")
FEATURES = ("float32", "bfloat16")


def card(**dtypes):
    placeholders = tuple(Placeholder(name, f"<{name}>", index, f"<{name}>") for index, name in enumerate(dtypes))
    return ModelCard("family", b"fingerprint", placeholders, dtypes, {})


BOTH = card(image=PIXELS, audio=FEATURES)
SOUND = card(audio=FEATURES)


def offered(model_card, modality, wanted):
    """Return the dtype that a frontend asks the writer for."""
    part = MediaPart(modality, "data:,", "messages[0].content[0]")
    medium = Medium(b"medium", bytes(32), 0.0)
    item = wanted_item(
        part, medium, card=model_card, scope=bytes(32), hash_name="blake3", dtype=wanted, io={}, kwargs={}
    )
    return msgspec.msgpack.decode(item.options, type=ItemOptions).dtype


@pytest.mark.parametrize("resolve", [ModelCard.dtype, offered])
@pytest.mark.parametrize(
    ("modality", "wanted", "dtype"),
    [
        ("image", "auto", "uint8"),
        ("audio", "auto", "float32"),
        ("image", "uint8", "uint8"),
        ("audio", "uint8", "float32"),
        ("image", "bfloat16", "bfloat16"),
        ("audio", "bfloat16", "bfloat16"),
        ("audio", "float16", "float32"),
    ],
)
def test_a_modality_without_the_wanted_dtype_takes_its_own(resolve, modality, wanted, dtype):
    assert resolve(BOTH, modality, wanted) == dtype


@pytest.mark.parametrize("wanted", ["uint8", "float16"])
def test_a_dtype_that_no_modality_has_is_refused_in_requests_and_at_the_start(wanted):
    assert SOUND.dtype("audio", wanted) is None
    with pytest.raises(InvalidRequest, match=f"'audio' come as float32, bfloat16, not as {wanted}") as refused:
        offered(SOUND, "audio", wanted)
    assert refused.value.param == "mm_dtype"
    with pytest.raises(StartupError, match=f"--tensor-dtype {wanted}: .*come as float32, bfloat16; give one of these"):
        _check_dtype(wanted, SOUND)


@pytest.mark.parametrize("wanted", ["auto", *PIXELS])
def test_a_service_starts_with_a_dtype_that_some_modality_has(wanted):
    _check_dtype(wanted, BOTH)


def test_the_start_names_every_dtype_of_the_model_once():
    with pytest.raises(StartupError, match="come as uint8, float32, bfloat16, float16; give"):
        _check_dtype("int64", BOTH)
