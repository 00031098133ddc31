from mmprep.wire.messages import Alias, Offered, Recalled
from mmprep_worker.writer.aliases import Aliases

A, B, C, D = (bytes([number]) * 32 for number in range(4))
CAT, DOG = b"c" * 32, b"d" * 32


def offered(alias, digest):
    return Offered(bytes(32), "image", 1, 1, None if alias is None else Alias(alias, digest))


def test_an_alias_stands_for_the_content_that_was_last_sent_with_it():
    aliases = Aliases()
    assert aliases.get(A) is None
    aliases.point(A, CAT)
    aliases.point(B, CAT)
    aliases.point(A, DOG)
    assert (aliases.get(A), aliases.get(B)) == (DOG, CAT)


def test_of_the_items_of_one_offer_the_last_counts_and_those_without_an_alias_change_nothing():
    aliases = Aliases()
    aliases.note([offered(A, CAT), offered(None, CAT), Recalled(B, bytes(32), "image"), offered(A, DOG)])
    assert (aliases.get(A), len(aliases)) == (DOG, 1)


def test_the_least_recently_used_goes_first():
    aliases = Aliases(3)
    for alias in (A, B, C):
        aliases.point(alias, CAT)
    aliases.get(A)
    aliases.point(B, DOG)
    aliases.point(D, CAT)
    assert [aliases.get(alias) for alias in (A, B, C, D)] == [CAT, DOG, None, CAT]


def test_all_are_forgotten_at_once():
    aliases = Aliases()
    aliases.point(A, CAT)
    aliases.clear()
    assert (aliases.get(A), len(aliases)) == (None, 0)
