import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep.errors import StartupError
from mmprep.sizes import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 2**20),
        ("1GiB", 2**30),
        ("1.5 gib", 3 * 2**29),
        ("2GB", 2_000_000_000),
        ("10kB", 10_000),
        ("4096", 4096),
        ("7 B", 7),
        (4096, 4096),
        ("0", 0),
        (" 1TiB ", 2**40),
    ],
)
def test_a_size_reads_as_people_write_it(text, size):
    assert parse_size(text, "--cache-size") == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "-1",
        "-1GiB",
        "1e9",
        "inf",
        "nan",
        "1 2MiB",
        "512M",
        "1GiBs",
        "0x10",
        "٣MiB",
        "9" * 30,
        "99999999TiB",
        True,
    ],
)
def test_what_is_no_size_is_an_error_that_names_the_option(text):
    with pytest.raises(StartupError, match=r"^--cache-size: "):
        parse_size(text, "--cache-size")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("24h", 86400),
        ("500ms", 0.5),
        ("5min", 300),
        ("5m", 300),
        ("7d", 604800),
        ("1.5", 1.5),
        (30, 30),
        (0.25, 0.25),
        (1e-5, 1e-5),
        ("10us", 1e-5),
    ],
)
def test_a_duration_reads_as_people_write_it(text, seconds):
    assert parse_duration(text, "--lease-seconds") == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1y", "1h30m", "inf", float("inf"), float("nan"), "30 sec onds"])
def test_what_is_no_duration_is_an_error_that_names_the_option(text):
    with pytest.raises(StartupError, match=r"^--lease-seconds: "):
        parse_duration(text, "--lease-seconds")


def test_an_error_quotes_only_the_start_of_a_long_value():
    with pytest.raises(StartupError) as caught:
        parse_size("x" * 10_000, "--cache-size")
    assert len(caught.value.message) < 200


@given(st.integers(0, 2**63 - 1))
def test_a_number_without_a_unit_is_bytes(size):
    assert parse_size(str(size), "--x") == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 * 2**20, "512 MiB"),
        (2**30, "1 GiB"),
        (2**52, "4096 TiB"),
    ],
)
def test_sizes_are_written_in_binary_units(size, text):
    assert format_size(size) == text


@given(st.integers(0, 2**60))
def test_a_written_size_reads_back_within_its_rounding(size):
    assert parse_size(format_size(size), "--x") == pytest.approx(size, rel=0.051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.0003, "0.3 ms"), (0.5, "500 ms"), (30, "30 s"), (300, "5 min"), (86400, "24 h"), (604800, "7 d")],
)
def test_durations_are_written_in_a_unit_that_fits(seconds, text):
    assert format_duration(seconds) == text
