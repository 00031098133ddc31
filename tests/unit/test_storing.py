"""What a host's headers say about keeping its medium."""

import pytest

from mmprep_frontend.media.storing import Validators, keeping, read_validators

TAG = Validators('"a"')


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ("", "ttl"),
        ("public, max-age=60", "ttl"),
        ("max-age=0, must-revalidate", "ttl"),
        ("no-store", "never"),
        ("NO-STORE", "never"),
        ("max-age=60,no-store", "never"),
        ("private", "never"),
        ('private="set-cookie, a", max-age=1', "never"),
        ("no-cache, private", "never"),
        ("no-cache", "ask"),
        ('no-cache="x"', "ask"),
        ("max-age=1 , No-Cache", "ask"),
        ('extension="no-store, private"', "ttl"),
        ('extension="a \\" no-store"', "ttl"),
        ("no-storey", "ttl"),
        (';;,,"', "ttl"),
    ],
)
def test_directives_decide_whether_an_answer_is_kept(control, expected):
    assert keeping(control, "", TAG) == expected


def test_what_must_be_asked_about_and_cannot_be_is_not_kept():
    assert keeping("no-cache", "", Validators()) == "never"
    assert keeping("", "", Validators()) == "ttl"


@pytest.mark.parametrize(("vary", "expected"), [("*", "never"), ("Accept, *", "never"), ("Accept-Encoding", "ttl")])
def test_an_answer_for_one_question_alone_is_not_kept(vary, expected):
    assert keeping("", vary, TAG) == expected


@pytest.mark.parametrize(
    ("etag", "kept"),
    [
        ('"a"', '"a"'),
        ('W/"a"', 'W/"a"'),
        ('""', '""'),
        ("a", ""),
        ('"a"b"', ""),
        ('"\x7f"', ""),
        (f'"{"a" * 513}"', ""),
    ],
)
def test_only_proper_tags_are_sent_back(etag, kept):
    assert read_validators({"ETag": etag}) == Validators(kept)


def test_the_tag_is_asked_with_before_the_date():
    date = "Sat, 01 Jan 2022 00:00:00 GMT"
    both = read_validators({"ETag": '"a"', "Last-Modified": date})
    assert both.condition() == {"If-None-Match": '"a"'}
    assert read_validators({"Last-Modified": date}).condition() == {"If-Modified-Since": date}
    assert (Validators().condition(), bool(Validators())) == ({}, False)
    assert read_validators({"Last-Modified": "a\r\nb"}) == Validators()


def test_a_later_304_may_bring_new_validators():
    assert Validators('"a"', "x").renewed(Validators('"b"')) == Validators('"b"', "x")
    assert Validators('"a"', "x").renewed(Validators()) == Validators('"a"', "x")
