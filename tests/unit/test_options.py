"""The options of ``serve``: which of three places wins, and what a wrong value is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmprep.cli.options import OPTIONS, parser, resolve
from mmprep.errors import StartupError

WRONG = {
    "host": ["", "  "],
    "port": ["-1", "65536", "http", "1.5", ""],
    "otlp-traces-endpoint": ["collector:4318", "ftp://collector/", "http://", "http://[::1"],
    "frontends": ["0", "257", "two"],
    "lanes": ["-1", "257", "all"],
    "cache-size": ["lots", "1kB", "1023KiB", "65TiB", "-1GiB", "1K", "nan", ""],
    "lane-memory": ["63MiB", "2TiB", "much", ""],
    "task-timeout": ["99ms", "2d", "soon"],
    "max-object-size": ["lots", "4095", "257MiB", "-1"],
    "spill-size": ["half", "-1", "65TiB"],
    "inline-size": ["lots", "-1MiB", "65TiB", ""],
    "limit-mm-per-prompt": ["image", "image=", "image=-1", "image=257", "picture=1", "image=1;video=1", "=1"],
    "max-model-len": ["0", "-5", "many"],
    "tensor-dtype": ["float64", "UINT8", ""],
    "hash": ["md5", ""],
    "lease-seconds": ["0", "soon", "-1s", "2d", "inf"],
    "queue-limit": ["0", "1000001", ""],
    "queues": ["a/b", "a b", "media", "é", ",".join(f"q{n}" for n in range(257))],
    "queue-jobs": ["0", "1000001", ""],
    "queue-size": ["1", "65GiB", ""],
    "job-timeout": ["0", "2d", ""],
    "job-expiry": ["0", "31d", ""],
    "job-attempts": ["0", "1001", ""],
    "request-timeout": ["0s", "1y", "25h"],
    "drain-timeout": ["-1s", "later"],
    "max-media-size": ["0", "huge", "1000PB"],
    "max-request-media-size": ["0", "1023", "65TiB", "much", ""],
    "max-body-size": ["0", "huge"],
    "max-image-pixels": ["0", "many"],
    "max-request-image-pixels": ["0", "-1", "1e9", "many", ""],
    "max-video-frames": ["0", "65537", "all"],
    "max-video-duration": ["0s", "2d", "long"],
    "max-audio-duration": ["0s", "2d", ""],
    "trust-request-mm-kwargs": ["maybe", ""],
    "api-key-file": ["/nonexistent/keys", "/proc/self/maps"],
    "admin-key-file": ["/nonexistent/keys"],
    "share-cache-across-keys": ["maybe", ""],
    "trust-request-chat-template": ["maybe", ""],
    "enable-injection": ["maybe", ""],
    "image-background": ["white", "#fff", "#fffffg", "ffffff", "255,255,255", "#ffffff00", "", " "],
    "allow-private-networks": ["maybe", "2", ""],
    "allowed-local-media-path": ["/nonexistent", "/proc/self/maps"],
    "media-cache-max-size": ["1023KiB", "65TiB", "much", ""],
    "media-cache-ttl": ["-1s", "3651d", "soon", ""],
    "chat-template": ["/nonexistent/template"],
    "remote-endpoint": [
        "tcp://",
        "127.0.0.1:7790",
        "ipc:///run/mmprep",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:65536",
        "tcp://engines.example:7790",
        "tcp://[::g]:7790",
        "tcp://0.0.0.0:7790",
        "tcp://10.0.0.5:7790",
    ],
    "curve-key-file": ["/nonexistent/service.key"],
    "curve-clients-dir": ["/nonexistent/clients"],
    "allow-plain-remote": ["true", "maybe", ""],
    "log-format": ["xml", ""],
    "log-level": ["trace", "WARNING"],
}
#: Every text is right for these, or the system decides.
FREE = {"runtime-dir", "served-model-name", "allowed-media-domains", "media-cache-dir"}
ENVIRONMENT = {"queue-limit": "MMPREP_QUEUE_LIMIT", "cache-size": "MMPREP_CACHE_SIZE", "port": "MMPREP_PORT"}


def decide(*arguments, environment=None, model=None):
    return resolve(parser("serve", "").parse_args(arguments), model, environment or {})


def variable(option):
    return "MMPREP_" + option.upper().replace("-", "_")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mmprep.toml"

    def write(text):
        path.write_text(text)
        return str(path)

    return write


def test_without_anything_the_defaults_are_those_of_the_interface():
    options = decide()
    assert (options.host, options.port, options.frontends) == ("127.0.0.1", 8790, 2)
    assert (options.cache_size, options.max_object_size) == (1 << 30, 1 << 28)
    assert (options.spill_size, options.inline_size) == (1 << 29, 1 << 28)
    assert options.limit_mm_per_prompt == {"image": 8, "video": 1, "audio": 4}
    assert (options.tensor_dtype, options.hash, options.log_level) == ("auto", "blake3", "warning")
    assert (options.lease_seconds, options.request_timeout, options.drain_timeout) == (30.0, 60.0, 10.0)
    assert options.max_media_size == 256 << 20
    assert (options.lane_memory, options.task_timeout) == (4 << 30, 25.0)
    assert (options.max_request_media_size, options.max_request_image_pixels) == (512 << 20, 500_000_000)
    assert (options.max_image_pixels, options.image_background) == (178_956_970, (255, 255, 255))
    assert options.served_model_name == "mmprep-demo"
    assert options.lanes >= 2
    assert options.allowed_media_domains == ()
    assert not options.allow_private_networks
    assert options.allowed_local_media_path is None
    assert options.max_model_len is options.chat_template is options.runtime_dir is None


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(file):
    config = file("queue-limit = 1\nport = 1\nfrontends = 1\nhash = 'sha256'\n")
    environment = {"MMPREP_QUEUE_LIMIT": "2", "MMPREP_PORT": "2", "MMPREP_LOG_LEVEL": "info"}
    options = decide("--config", config, "--queue-limit", "3", environment=environment)
    assert (options.queue_limit, options.port, options.frontends, options.hash) == (3, 2, 1, "sha256")
    assert options.log_level == "info"


def test_the_file_may_be_named_by_the_environment_and_the_command_line_wins_here_too(file, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text("port = 7")
    environment = {"MMPREP_CONFIG": str(other)}
    assert decide(environment=environment).port == 7
    assert decide("--config", file("port = 8"), environment=environment).port == 8


@pytest.mark.parametrize("option", [option.name for option in OPTIONS])
def test_every_option_has_wrong_values_or_none(option):
    assert (option in WRONG) != (option in FREE)


@pytest.mark.parametrize(("option", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_an_error_that_names_the_option_wherever_it_stands(option, value, file):
    places = [{"environment": {variable(option): value}}, {"arguments": ["--config", file(f"{option} = '{value}'")]}]
    if option not in {
        "allow-private-networks",
        "trust-request-mm-kwargs",
        "trust-request-chat-template",
        "enable-injection",
        "share-cache-across-keys",
        "allow-plain-remote",
    }:
        places.append({"arguments": [f"--{option}={value}"]})
    for place in places:
        with pytest.raises(StartupError, match=f"--{option}"):
            decide(*place.get("arguments", ()), environment=place.get("environment"))


ENGINES = {"VLLM_MEDIA_CACHE": "/c", "VLLM_MEDIA_CACHE_MAX_SIZE_MB": "64", "VLLM_MEDIA_CACHE_TTL_HOURS": "0.5"}


def test_the_variables_of_an_engine_are_honoured_after_our_own(file):
    def cache(*arguments, **own):
        options = decide(*arguments, environment=ENGINES | own)
        return str(options.media_cache_dir), options.media_cache_max_size, options.media_cache_ttl

    assert cache() == ("/c", 64 << 20, 1800.0)
    assert cache("--config", file("media-cache-ttl = '1s'\nmedia-cache-dir = '/f'")) == ("/c", 64 << 20, 1800.0)
    assert cache(MMPREP_MEDIA_CACHE_TTL="2h", MMPREP_MEDIA_CACHE_DIR="/m") == ("/m", 64 << 20, 7200.0)
    assert cache("--media-cache-max-size", "1GiB", "--media-cache-dir", "/o") == ("/o", 1 << 30, 1800.0)
    assert cache(VLLM_MEDIA_CACHE_MAX_SIZE_MB="", VLLM_MEDIA_CACHE_TTL_HOURS=" ")[1:] == (5 << 30, 86400.0)


@pytest.mark.parametrize(
    ("variable", "option"),
    [("VLLM_MEDIA_CACHE_MAX_SIZE_MB", "--media-cache-max-size"), ("VLLM_MEDIA_CACHE_TTL_HOURS", "--media-cache-ttl")],
)
def test_a_wrong_number_in_an_engines_variable_is_an_error_that_names_the_option(variable, option):
    for wrong in ("many", "-1", "64MiB"):
        with pytest.raises(StartupError, match=rf"{option} \({variable}\)"):
            decide(environment={variable: wrong})


def test_the_address_for_other_hosts_has_two_names(file):
    address = "tcp://127.0.0.1:7790"
    for options in (
        decide("--zmq-bind", address),
        decide(environment={"MMPREP_ZMQ_BIND": address}),
        decide("--config", file(f"zmq-bind = '{address}'")),
    ):
        assert str(options.remote_endpoint) == address


def test_there_is_no_disk_cache_unless_it_gets_a_directory(tmp_path):
    assert decide().media_cache_dir is None
    frontend = decide("--media-cache-dir", "relative").frontend(0, tmp_path, 1, joins=False)
    assert Path(frontend.media_cache_dir) == Path("relative").absolute()


def test_names_in_the_file_may_have_dashes_or_underscores(file):
    assert decide("--config", file("queue_limit = 5")).queue_limit == 5
    assert decide("--config", file("queue-limit = 5")).queue_limit == 5


def test_the_file_may_use_the_types_of_toml(file):
    text = """
    cache-size = 67108864
    lease-seconds = 1.5
    allow-private-networks = true
    allowed-media-domains = ["a.example", "*.b.example"]
    max-model-len = 4096
    [limit-mm-per-prompt]
    image = 2
    video = 0
    """
    options = decide("--config", file(text))
    assert (options.cache_size, options.lease_seconds, options.max_model_len) == (64 << 20, 1.5, 4096)
    assert options.allow_private_networks
    assert options.allowed_media_domains == ("a.example", "*.b.example")
    assert options.limit_mm_per_prompt == {"image": 2, "video": 0, "audio": 4}


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("port = true", "--port"),
        ("port = 1.5", "--port"),
        ("hash = 5", "--hash"),
        ("lease-seconds = 1979-05-27", "--lease-seconds"),
        ("lease-seconds = nan", "--lease-seconds"),
        ("lease-seconds = inf", "--lease-seconds"),
        ("limit-mm-per-prompt = {image = 1.5}", "--limit-mm-per-prompt"),
        ("host = ''", "--host"),
        ("[cache]\nsize = 1", "--config"),
        ("prot = 1", "--config"),
        ("port = ", "--config"),
        ("port = 1\nport = 2", "--config"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_option(text, option, file):
    with pytest.raises(StartupError, match=option):
        decide("--config", file(text))


def test_an_unknown_option_in_the_file_is_named(file):
    with pytest.raises(StartupError, match="'prot'"):
        decide("--config", file("prot = 1"))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(StartupError, match="--config"):
        decide("--config", str(tmp_path / "absent.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match="--config"):
        decide("--config", str(tmp_path / "binary.toml"))


@pytest.mark.parametrize(
    ("text", "on"), [("1", True), ("TRUE", True), ("yes", True), ("0", False), ("off", False), ("No", False)]
)
def test_a_switch_reads_the_usual_words_in_the_environment(text, on):
    assert decide(environment={"MMPREP_ALLOW_PRIVATE_NETWORKS": text}).allow_private_networks is on


def test_a_switch_on_the_command_line_needs_no_value():
    assert decide("--allow-private-networks").allow_private_networks


def test_the_largest_object_is_at_most_a_quarter_of_the_cache_and_by_default_that():
    assert decide("--cache-size", "64MiB").max_object_size == 16 << 20
    assert decide("--cache-size", "64MiB", "--max-object-size", "1MiB").max_object_size == 1 << 20
    with pytest.raises(StartupError, match="--max-object-size"):
        decide("--cache-size", "64MiB", "--max-object-size", "17MiB")


def test_limits_of_modalities_that_are_not_named_keep_their_defaults():
    for text, limits in ((" image=3 , ", (3, 1, 4)), ("video=2", (8, 2, 4)), ("", (8, 1, 4))):
        assert tuple(decide("--limit-mm-per-prompt", text).limit_mm_per_prompt.values()) == limits


def test_spills_have_half_of_the_caches_size_unless_told_otherwise_and_none_is_a_choice():
    assert decide("--cache-size", "64MiB").spill_size == 32 << 20
    assert decide("--cache-size", "64MiB", "--spill-size", "1GiB").spill_size == 1 << 30
    options = decide("--spill-size", "0", "--inline-size", "0")
    assert (options.spill_size, options.inline_size) == (0, 0)


def test_domains_are_split_at_commas():
    assert decide(
        "--allowed-media-domains", "a.example, *.b.example:8443,[2606:4700::1111]:81,"
    ).allowed_media_domains == (
        "a.example",
        "*.b.example:8443",
        "[2606:4700::1111]:81",
    )


@pytest.mark.parametrize(
    ("text", "colour"), [("#FF8000", (255, 128, 0)), ("#000000", (0, 0, 0)), ("none", None), ("None", None)]
)
def test_a_background_is_a_colour_or_none_and_the_writer_is_told(text, colour, tmp_path):
    options = decide("--image-background", text)
    assert options.image_background == options.writer(tmp_path).image_background == colour


def test_there_are_at_least_two_lanes_however_few_are_asked_for():
    assert decide("--lanes", "1").lanes == 2
    assert decide("--lanes", "5").lanes == 5


def test_a_chat_template_is_read_from_its_file(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    assert decide("--chat-template", str(path)).chat_template == "{{ messages }}"


def test_a_model_directory_gives_the_served_name_unless_one_is_given(tmp_path):
    directory = tmp_path / "my-model"
    directory.mkdir()
    with pytest.raises(StartupError, match=r"config\.json"):
        decide(model=str(directory))
    (directory / "config.json").write_text("{}")
    assert decide(model=str(directory)).served_model_name == "my-model"
    assert decide("--served-model-name", "x", model=str(directory)).served_model_name == "x"


def test_a_model_that_is_neither_a_directory_nor_a_hub_id_is_an_error():
    with pytest.raises(StartupError, match="no model directory"):
        decide(model="./absent")


def test_the_parts_of_writer_and_frontend_follow_from_the_options(tmp_path):
    options = decide("--max-media-size", "2GiB", "--request-timeout", "10s", "--spill-size", "3MiB")
    writer, frontend = options.writer(tmp_path), options.frontend(1, tmp_path, 99, joins=False)
    assert writer.queue_bytes >= writer.max_media_size == frontend.max_media_size == 2 << 30
    assert (writer.spill_size, writer.inline_size, frontend.inline_size) == (3 << 20, 256 << 20, 256 << 20)
    assert writer.max_image_pixels == frontend.max_image_pixels == 178_956_970
    assert (frontend.max_request_media_size, frontend.max_request_image_pixels) == (512 << 20, 500_000_000)
    assert (frontend.fetch_timeout, frontend.port, frontend.index) == (10.0, 99, 1)


def test_help_names_every_option_with_its_default():
    text = " ".join(parser("serve", "").format_help().split())
    for option in OPTIONS:
        assert f"--{option.name}" in text
        assert option.flag or not option.default or f"(default: {option.default})" in text


def test_the_directory_for_local_media_has_to_be_there_and_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    options = decide("--allowed-local-media-path", tmp_path.name)
    assert (
        options.allowed_local_media_path
        == options.frontend(0, tmp_path, 1, joins=False).allowed_local_media_path
        == str(tmp_path)
    )
    assert decide("--allowed-local-media-path", "").allowed_local_media_path is None
