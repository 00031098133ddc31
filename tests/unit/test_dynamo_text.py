"""Text of an answer to Dynamo's caller: whole but for a stop string, and never a part of one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep import embedded
from mmprep.bridges.dynamo.factory import read_decoder, read_eos
from mmprep.bridges.dynamo.text import AnswerText
from mmprep.errors import StartupError

#: So few letters that stop strings occur, overlap and begin in vain.
LETTERS = "ab"
PIECES = st.lists(st.none() | st.text(LETTERS, max_size=3), max_size=12)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3)


@given(PIECES, STOPS, st.booleans())
def test_an_answer_ends_where_its_whole_text_first_has_a_stop_string(pieces, stops, include):
    answer = AnswerText(pieces.__getitem__, stops, include_stop=include)
    given_out = []
    for number in range(len(pieces)):
        given_out.append(answer.feed([number]))
        whole = "".join(piece or "" for piece in pieces[: number + 1])
        ends = [whole.index(stop) + len(stop) for stop in stops if stop in whole]
        assert answer.stopped == bool(ends)
        if ends:
            break
        assert whole.startswith("".join(given_out))
    words = "".join(given_out) + answer.end()
    if not answer.stopped:
        assert words == "".join(piece or "" for piece in pieces)
        return
    found = min((whole.index(stop), stop) for stop in stops if stop in whole)
    assert words == whole[: found[0]] + (found[1] if include else "")
    assert answer.feed(range(len(pieces))) == ""


@given(st.text(max_size=40))
def test_the_text_of_ids_one_by_one_is_the_text_of_all(words):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(embedded.path() / "tokenizer.json"))
    ids = tokenizer.encode(words, add_special_tokens=False).ids
    decode = read_decoder(embedded.path())(True)
    text = AnswerText(decode).feed(ids)
    whole = tokenizer.decode(ids)
    assert text == whole[: len(text)]
    assert whole[len(text) :].strip("\N{REPLACEMENT CHARACTER}") == ""


def test_a_model_tells_its_ends_and_its_tokenizer(tmp_path):
    assert read_eos(embedded.path()) == [6146, 6144]
    assert read_eos(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert read_eos(tmp_path) == [7]
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        read_decoder(tmp_path)
