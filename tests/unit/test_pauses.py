from mmprep_worker.writer.pauses import CATCH_UP_SECONDS, STARVED_SECONDS, Pauses


def test_turns_in_time_leave_nothing_to_catch_up():
    pauses = Pauses(0.0, turn_seconds=1.0)
    for turn in range(5):
        pauses.turned(turn * (1.0 + STARVED_SECONDS), input_ready=True)
        assert not pauses.behind


def test_after_a_pause_time_counts_again_when_all_that_has_arrived_was_read():
    pauses = Pauses(0.0, turn_seconds=1.0)
    pauses.turned(10.0, input_ready=False)
    assert pauses.behind
    pauses.turned(10.1, input_ready=True)
    assert pauses.behind
    pauses.turned(10.2, input_ready=False)
    assert not pauses.behind


def test_input_without_end_does_not_stop_time_for_ever():
    pauses = Pauses(0.0, turn_seconds=1.0)
    pauses.turned(10.0, input_ready=True)
    now = 10.0
    while now <= 10.0 + CATCH_UP_SECONDS:
        assert pauses.behind
        now += 0.5
        pauses.turned(now, input_ready=True)
    assert not pauses.behind
