import msgspec
import pytest
from blake3 import blake3

from mmprep.card import FieldForm, ItemOptions, ModelCard
from mmprep.errors import InvalidRequest, NotFound
from mmprep.items import ItemMeta, Plan, lay_out
from mmprep.keys import item_key
from mmprep.wire.messages import Alias, ItemAnswer, Recalled
from mmprep_frontend.media.intake import Medium
from mmprep_frontend.media.keys import alias, injected_hash, injected_key, variant
from mmprep_frontend.render.conversation import MediaPart
from mmprep_frontend.wanted import check_injected, key_of, recalled_within, wanted

FORM = FieldForm("pixels", ("uint8", "float32"), (4,), "flat", False)
CARD = ModelCard(
    "any", b"fingerprint", (), {"image": ("uint8", "float32"), "video": ("uint8",)}, {}, fields={"image": (FORM,)}
)
META = ItemMeta("image", Plan(()), lay_out([("pixels", "uint8", (4,), "flat", False)]), {})
SCOPE = b"s" * 32
CAT, DOG = Medium(b"cat", b"c" * 32, 0.0), Medium(b"dog!", b"d" * 32, 0.0)


def part(uuid=None, modality="image"):
    return MediaPart(modality, "data:", "messages[0].content[0].image_url", uuid=uuid)


def asked(part, medium, *, dtype="auto", io=None, kwargs=None, scope=SCOPE, injected=False):
    how = {"hash_name": "blake3", "dtype": dtype, "io": io or {}, "kwargs": kwargs or {}, "injected": injected}
    return wanted(part, medium, card=CARD, scope=scope, **how)


def processed(dtype="uint8", options=b"", modality="image", scope=SCOPE):
    return variant(
        scope=scope,
        hash_name="blake3",
        modality=modality,
        fingerprint=b"fingerprint",
        dtype=dtype,
        options=options,
    )


def test_a_medium_is_offered_under_the_key_of_its_variant_and_digest():
    item = asked(part(), CAT)
    assert item.key == item_key(processed(), CAT.digest)
    assert (item.modality, item.medium, item.digest, item.alias) == ("image", b"cat", CAT.digest, None)
    assert msgspec.msgpack.decode(item.options, type=ItemOptions) == ItemOptions("uint8", b"")


def test_a_medium_with_a_uuid_is_offered_with_its_alias():
    item = asked(part("u"), CAT)
    assert item.alias == Alias(alias(scope=SCOPE, modality="image", uuid="u"), CAT.digest)
    assert item.key == asked(part(), CAT).key
    assert item.offered().alias == item.alias


def test_a_uuid_alone_is_recalled_in_the_variant_that_the_request_asks_for():
    name = alias(scope=SCOPE, modality="image", uuid="u")
    assert asked(part("u"), None) == Recalled(name, processed(), "image")
    assert asked(part("u"), None, dtype="float32") == Recalled(name, processed("float32"), "image")
    io = {"image": {"rgba": True}}
    assert asked(part("u"), None, io=io) == Recalled(name, processed(options=b'{"rgba":true}'), "image")
    assert asked(part("u", "video"), None).alias != name
    other = asked(part("u"), None, scope=b"o" * 32)
    assert other.alias != name
    assert other.variant == processed(scope=b"o" * 32)


def test_what_is_chosen_about_processing_is_told_and_part_of_the_key():
    plain, kwargs = asked(part("u"), CAT), {"image": b'{"a":1}'}
    chosen = asked(part("u"), CAT, kwargs=kwargs)
    assert msgspec.msgpack.decode(chosen.options, type=ItemOptions) == ItemOptions("uint8", b"", b'{"a":1}')
    assert asked(part("u"), CAT, kwargs={"video": b'{"a":1}'}).key == plain.key
    # How a medium is read and how it is processed are never taken for each other.
    read = asked(part("u"), CAT, io={"image": {"a": 1}})
    both = asked(part("u"), CAT, io={"image": {"a": 1}}, kwargs=kwargs)
    other = asked(part("u"), CAT, kwargs={"image": b'{"a":2}'})
    assert len({item.key for item in (plain, chosen, read, both, other)}) == 5
    recalled = asked(part("u"), None, kwargs=kwargs)
    assert item_key(recalled.variant, CAT.digest) == chosen.key


def parts(*parts):
    """Return the number of parts, then each behind its length."""
    return b"".join((len(parts).to_bytes(8, "little"), *(len(part).to_bytes(8, "little") + part for part in parts)))


def test_the_key_of_a_medium_that_is_read_and_processed_as_a_request_chose_is_that_of_its_version():
    # A change here changes every such key.
    keys = set()
    for names in (("num_frames", "fps"), ("fps", "num_frames")):
        io = {name: {"num_frames": 16, "fps": 2.5}[name] for name in names}
        keys.add(asked(part(), CAT, io={"image": io}, kwargs={"image": b'{"max_pixels":1}'}).key)
    options = parts(b'{"fps":2.5,"num_frames":16}', b'{"max_pixels":1}')
    given = (b"mmprep item variant 1", SCOPE, b"blake3", b"image", b"fingerprint", b"uint8", options)
    by_hand = blake3(parts(b"mmprep item key 2", blake3(parts(*given)).digest(), CAT.digest)).digest()
    assert keys == {by_hand}
    assert by_hand.hex() == "4533ae926743460aa20bb67644298c7eda128185ef10f8c420cdf351ce2ae15a"


def test_the_key_of_what_is_recalled_is_that_of_the_same_medium_with_its_data():
    sent, recalled = asked(part("u"), CAT, dtype="float32"), asked(part("u"), None, dtype="float32")
    assert item_key(recalled.variant, sent.alias.digest) == sent.key
    assert key_of(sent, ItemAnswer("hit"), META) == key_of(recalled, ItemAnswer("hit", key=sent.key), META) == sent.key
    with pytest.raises(ValueError, match="lacks the key"):
        key_of(recalled, ItemAnswer("hit"), META)


def test_where_items_may_be_injected_a_uuid_names_what_may_be_and_engines_hear_of_its_content():
    named = injected_key(scope=SCOPE, modality="image", fingerprint=b"fingerprint", name="u")
    recalled = asked(part("u"), None, injected=True)
    assert recalled.injected == asked(part("u"), CAT, injected=True).alias.injected == named
    assert asked(part(), CAT, injected=True).alias is None
    assert asked(part("u"), None, dtype="float32", injected=True).injected == named
    for other in ({"scope": b"o" * 32}, {"modality": "video"}):
        changed = {"scope": SCOPE, "modality": "image", **other}
        assert asked(part("u", changed["modality"]), None, scope=changed["scope"], injected=True).injected != named
    first, second = (msgspec.structs.replace(META, injected=bytes([number]) * 32) for number in (1, 2))
    answer = ItemAnswer("hit", key=named)
    assert key_of(recalled, answer, first) == injected_hash(named, first.injected)
    assert len({key_of(recalled, answer, meta) for meta in (META, first, second)}) == 3


def test_what_was_injected_in_another_dtype_than_a_request_asks_for_is_not_found():
    check_injected(part(), META, CARD, "float32")
    injected = msgspec.structs.replace(META, injected=bytes(32))
    for dtype in ("auto", "uint8"):
        check_injected(part(), injected, CARD, dtype)
    with pytest.raises(NotFound, match="uint8, not as float32") as caught:
        check_injected(part(), injected, CARD, "float32")
    assert caught.value.param == "messages[0].content[0].image_url"


def test_a_dtype_that_the_model_does_not_have_is_refused_with_and_without_data():
    for medium in (CAT, None):
        with pytest.raises(InvalidRequest) as caught:
            asked(part("u"), medium, dtype="bfloat16")
        assert caught.value.param == "mm_dtype"


def test_within_a_request_a_uuid_alone_is_the_medium_that_came_last_with_it_before():
    parts = [part("u"), part("u"), part("v"), part("u"), part("u"), part(), part("u", "video")]
    media = [None, CAT, None, None, DOG, CAT, None]
    assert recalled_within(parts, media) == [None, CAT, None, CAT, DOG, CAT, None]


def test_only_a_picture_costs_the_pixels_of_its_header():
    known = Medium(b"cat", b"c" * 32, 0.0, pixels=1_000_000)
    assert asked(part(), known).cost == 1_000_000
    assert asked(part(), CAT).cost == 4096
    assert asked(part(modality="video"), known).cost == asked(part(modality="video"), CAT).cost
