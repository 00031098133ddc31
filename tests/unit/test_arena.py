"""The allocator's rules, one by one."""

import pytest

from mmprep.arena import Allocation, Arena, Verdict

K, S, E = Verdict.KEEP, Verdict.SPARE, Verdict.EVICT


def filled(*lengths):
    """Return an arena full of extents of these many units, and their offsets; the hand is at the start."""
    arena = Arena(64 * sum(lengths))
    return arena, [arena.allocate(64 * n, never).offset for n in lengths]


def never(offset):
    raise AssertionError(f"asked about {offset}")


def answers(verdicts):
    """Return a verdict function that clears the marks it has answered."""

    def verdict(offset):
        answer = verdicts[offset]
        if answer is S:
            verdicts[offset] = E
        return answer

    return verdict


def test_an_empty_arena_grants_from_its_start_without_asking():
    arena = Arena(640)
    assert arena.allocate(1, never) == Allocation(0, 64, (), 1)
    assert arena.allocate(65, never) == Allocation(64, 128, (), 1)
    assert arena.free_bytes == 448
    assert list(arena.extents()) == [(0, 64), (64, 128)]


def test_a_kept_extent_is_passed_over():
    arena, (a, b, c) = filled(2, 2, 2)
    allocation = arena.allocate(128, answers({a: K, b: E, c: E}))
    assert allocation == Allocation(b, 128, (b,), 2)


def test_a_spared_extent_is_passed_over_once():
    arena, (a, b) = filled(2, 2)
    marks = {a: S, b: E}
    assert arena.allocate(128, answers(marks)).evicted == (b,)
    assert arena.allocate(128, answers(marks)).evicted == (a,)


def test_where_all_are_spared_the_second_revolution_evicts():
    arena, (a, b) = filled(2, 2)
    assert arena.allocate(128, answers({a: S, b: S})) == Allocation(a, 128, (a,), 3)


def test_a_run_goes_across_free_space_and_several_victims():
    arena, (a, b, c, d) = filled(1, 1, 1, 1)
    arena.free(b)
    assert arena.allocate(256, answers({a: E, c: E, d: E})) == Allocation(a, 256, (a, c, d), 4)
    assert list(arena.extents()) == [(a, 256)]
    assert arena.free_bytes == 0


def test_the_first_run_that_fits_goes_and_nothing_behind_it():
    arena, (a, b, c) = filled(1, 4, 1)
    assert arena.allocate(256, answers({a: E, b: E, c: E})).evicted == (a, b)
    assert list(arena.extents()) == [(a, 256), (c, 64)]


def test_a_small_extent_before_long_ones_is_not_passed_over_for_ever():
    arena, (a, *_) = filled(1, 4, 4)
    evicted = [arena.allocate(256, lambda _: E).evicted for _ in range(3)]
    assert any(a in victims for victims in evicted)


def test_what_a_victim_had_too_much_is_free_again():
    arena, (a, b) = filled(4, 1)
    assert arena.allocate(64, answers({a: E, b: K})) == Allocation(a, 64, (a,), 1)
    assert arena.free_bytes == 192
    assert arena.allocate(192, never) == Allocation(64, 192, (), 1)


def test_a_run_does_not_wrap_around_the_end():
    arena, (a, b, c) = filled(2, 2, 2)
    arena.free(a)
    arena.free(c)
    assert arena.allocate(256, answers({b: K})) is None
    assert arena.allocate(128, answers({b: K})) is not None


def test_a_run_that_crosses_the_hands_start_is_found():
    arena, (a, b, c) = filled(2, 2, 2)
    assert arena.allocate(128, answers({a: E, b: E, c: E})).offset == a
    # The hand stands at b. The only run is a and b.
    assert arena.allocate(256, answers({a: S, b: E, c: K})).evicted == (a, b)


def test_a_full_arena_grants_nothing_and_evicts_nothing():
    arena, offsets = filled(2, 2, 2)
    before = list(arena.extents())
    verdicts = dict(zip(offsets, (E, K, S), strict=True))
    assert arena.allocate(192, answers(verdicts)) is None
    assert list(arena.extents()) == before
    assert arena.free_bytes == 0


def test_without_spared_extents_a_failure_takes_one_revolution():
    arena, offsets = filled(*[1] * 50)
    asked = []
    assert arena.allocate(64, lambda offset: asked.append(offset) or K) is None
    assert sorted(asked) == offsets


def test_freed_neighbours_become_one():
    arena, (a, b, c, d) = filled(1, 1, 1, 1)
    for offset in (a, c, b):
        arena.free(offset)
        arena.validate()
    assert arena.allocate(192, answers({d: K})) == Allocation(a, 192, (), 1)


def test_freeing_what_is_not_there_is_an_error():
    arena, (a, _) = filled(1, 1)
    arena.free(a)
    for offset in (a, 1, -64, 640):
        with pytest.raises(ValueError, match="no extent starts"):
            arena.free(offset)


@pytest.mark.parametrize("nbytes", [0, -1, 641])
def test_impossible_sizes_are_refused(nbytes):
    with pytest.raises(ValueError, match="1 to 640 bytes"):
        Arena(640).allocate(nbytes, never)


@pytest.mark.parametrize("capacity", [0, -64, 100])
def test_an_arena_is_a_positive_multiple_of_the_alignment(capacity):
    with pytest.raises(ValueError, match="multiple of 64"):
        Arena(capacity)


def test_a_state_is_rebuilt_extent_by_extent():
    arena = Arena(640)
    for offset, length in [(64, 100), (512, 128), (192, 64)]:
        arena.insert(offset, length)
        arena.validate()
    assert list(arena.extents()) == [(64, 128), (192, 64), (512, 128)]
    assert arena.free_bytes == 320


@pytest.mark.parametrize(
    ("offset", "length"),
    [(64, 64), (0, 65), (128, 64), (256, 320), (1, 64), (-64, 64), (640, 64), (576, 65), (0, 0)],
)
def test_an_extent_that_cannot_be_there_is_not_rebuilt(offset, length):
    arena = Arena(640)
    arena.insert(64, 128)
    arena.insert(512, 64)
    before = list(arena.extents())
    with pytest.raises(ValueError):
        arena.insert(offset, length)
    arena.validate()
    assert list(arena.extents()) == before


def test_allocations_of_a_warm_arena_take_a_few_steps():
    arena = Arena(64 * 1000)
    steps = [arena.allocate(64 * (1 + 7 * n % 13), lambda _: E).steps for n in range(3000)]
    assert sum(steps[1000:]) / 2000 < 4


def test_validate_finds_a_damaged_state():
    for damage in ("free_bytes", "_blocks"):
        arena, _ = filled(1, 2)
        setattr(arena, damage, 7)
        with pytest.raises(AssertionError, match="were counted"):
            arena.validate()
