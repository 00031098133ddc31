"""A real service against everything that would lead it inside: in a network of its own, where every address answers.

That nothing was dialled is what the servers there saw. Each attack that an address can be dialled for is also made on a
service whose policy is lifted: there the servers must see it.
"""

import subprocess
from urllib.parse import quote

import pytest
from tests import isolation
from tests.integration.inner_network import PUBLIC, PUBLIC_V6, inner_network

PART = "messages[0].content[1].image_url"

WHY_NOT = isolation.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

#: Addresses that must not be dialled, as URLs name them, and what the servers see where they are.
INNER = [
    ("127.0.0.1", "127.0.0.1"),
    ("127.255.255.254", "127.255.255.254"),
    ("0.0.0.0", "127.0.0.1"),
    ("0.1.2.3", "0.1.2.3"),
    ("10.0.0.5", "10.0.0.5"),
    ("172.16.0.5", "172.16.0.5"),
    ("192.168.0.5", "192.168.0.5"),
    ("100.64.0.5", "100.64.0.5"),
    ("100.100.100.200", "100.100.100.200"),
    ("169.254.169.254", "169.254.169.254"),
    ("168.63.129.16", "168.63.129.16"),
    ("192.0.0.192", "192.0.0.192"),
    ("198.18.0.1", "198.18.0.1"),
    ("240.0.0.1", "240.0.0.1"),
    ("[::1]", "::1"),
    ("[fd00::1]", "fd00::1"),
    ("[fd00:ec2::254]", "fd00:ec2::254"),
    ("[fec0::1]", "fec0::1"),
    ("[2001:db8::1]", "2001:db8::1"),
    ("[::10.0.0.5]", "::10.0.0.5"),
    ("[::ffff:10.0.0.5]", "10.0.0.5"),
    ("[::ffff:a9fe:a9fe]", "169.254.169.254"),
    ("[64:ff9b::a9fe:a9fe]", "64:ff9b::a9fe:a9fe"),
    ("[64:ff9b:1::a00:5]", "64:ff9b:1::a00:5"),
    ("[2002:a00:5::1]", "2002:a00:5::1"),
    ("[2001:0:7f00:1::f7f7:f7f7]", "2001:0:7f00:1::f7f7:f7f7"),
    ("[2606:4700::5efe:10.0.0.5]", "2606:4700::5efe:a00:5"),
]
#: What some parsers take for addresses like these.
SPELLINGS = [
    "http://2130706433/cat.png",
    "http://0x7f000001/cat.png",
    "http://017700000001/cat.png",
    "http://0177.0.0.1/cat.png",
    "http://0x7f.1/cat.png",
    "http://127.1/cat.png",
    "http://0/cat.png",
    "http://2852039166/latest/meta-data/",
    "http://0xa9fea9fe/latest/meta-data/",
    "http://169.254.43518/latest/meta-data/",
    "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/cat.png",
    "http://127\u30020\u30020\u30021/cat.png",
    "http://127.0.0.1./cat.png",
    "http://10.0.0.5.:80/cat.png",
    f"http://{PUBLIC}@10.0.0.5/cat.png",
    f"http://10.0.0.5\\@{PUBLIC}/cat.png",
    f"http://{PUBLIC}\\@10.0.0.5/cat.png",
    "http:\\\\10.0.0.5/cat.png",
    "http://10.0.0.5 /cat.png",
    "http://10.0.0.5\t/cat.png",
    "http://[::ffff:127.0.0.1%25lo]/cat.png",
    "http://[fe80::1]/cat.png",
    "http://255.255.255.255/cat.png",
    "http://224.0.0.1/cat.png",
    "http://[ff02::1]/cat.png",
]
#: Names that lead inside: what is asked for, and one address that the lifted service dials then.
NAMES = {
    "private": ([["10.0.0.5"]], "10.0.0.5"),
    "metadata": ([["169.254.169.254"]], "169.254.169.254"),
    "public and private": ([[PUBLIC, "10.0.0.5"]], None),
    "private and public": ([["10.0.0.5", PUBLIC]], None),
    "unique local": ([["fd00::1"]], "fd00::1"),
    "mapped": ([["::ffff:10.0.0.5"]], "10.0.0.5"),
    "NAT64": ([["64:ff9b::a9fe:a9fe"]], "64:ff9b::a9fe:a9fe"),
    "6to4": ([["2002:a00:5::1"]], "2002:a00:5::1"),
    "public IPv4, private IPv6": ([[PUBLIC, "fd00::1"]], None),
    "public IPv6, private IPv4": ([[PUBLIC_V6, "10.0.0.5"]], None),
}
LOCATIONS = [
    "http://127.0.0.1/cat.png",
    "http://10.0.0.5/cat.png",
    "//10.0.0.5/cat.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00::1]/cat.png",
    "http://[::ffff:10.0.0.5]/cat.png",
    "http://inner.test/cat.png",
    "https://10.0.0.5/cat.png",
]


@pytest.fixture(scope="module")
def network():
    with inner_network() as running:
        yield running


def needs(network, *addresses):
    if any(":" in address for address in addresses) and not network.has_ipv6:
        pytest.skip("this machine has no IPv6")


def forbidden(outcome):
    """Check that the answer is the documented one, and that it tells nothing of what lies inside."""
    error = outcome.error
    assert (outcome.status, error["type"], error["param"]) == (400, "BadRequestError", PART)
    assert not any(address in error["message"] for address in ("10.0.0.5", "169.254", "fd00", "::"))
    return error["message"]


@pytest.mark.parametrize(("host", "seen"), INNER)
def test_an_inner_address_is_not_dialled_unless_the_policy_is_lifted(network, host, seen):
    needs(network, host)
    url = f"http://{host}/cat.png"
    outcome = network.chat("strict", url)
    forbidden(outcome)
    assert outcome.dialled == outcome.asked == []
    assert network.chat("lifted", url) == (200, None, [seen], [])


def test_a_public_address_is_dialled_so_that_the_policy_is_no_wall(network):
    assert network.chat("strict", f"http://{PUBLIC}/cat.png") == (200, None, [PUBLIC], [])
    if network.has_ipv6:
        assert network.chat("strict", f"http://[{PUBLIC_V6}]/cat.png") == (200, None, [PUBLIC_V6], [])


@pytest.mark.parametrize("url", SPELLINGS)
def test_an_odd_spelling_is_not_dialled_by_anybody(network, url):
    outcome = network.chat("strict", url)
    assert (outcome.status, outcome.error["param"]) == (400, PART)
    assert outcome.dialled == outcome.asked == []


@pytest.mark.parametrize("scheme", ["https", "HTTP"])
def test_another_scheme_or_spelling_of_it_changes_nothing(network, scheme):
    url = f"{scheme}://10.0.0.5/cat.png"
    outcome = network.chat("strict", url)
    forbidden(outcome)
    assert outcome.dialled == []
    assert set(network.chat("lifted", url).dialled) == {"10.0.0.5"}


@pytest.mark.parametrize("what", NAMES)
def test_a_name_with_one_inner_address_is_refused_whole_and_asked_for_once(network, what):
    turns, dialled = NAMES[what]
    needs(network, *turns[0])
    url = "http://inner.test/cat.png"
    outcome = network.chat("strict", url, {"inner.test": turns})
    forbidden(outcome)
    assert outcome.dialled == []
    assert sorted(outcome.asked) == ["inner.test"] * 2, "each family once"
    lifted = network.chat("lifted", url, {"inner.test": turns})
    assert lifted.status == 200
    assert lifted.dialled == [dialled] if dialled else set(lifted.dialled) <= set(turns[0])


def test_the_systems_own_names_lead_nowhere_either(network):
    url = "http://localhost/cat.png"
    outcome = network.chat("strict", url)
    forbidden(outcome)
    assert outcome.dialled == []
    assert set(network.chat("lifted", url).dialled) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_redirect_inside_is_not_followed_unless_the_policy_is_lifted(network, location):
    needs(network, *(["::"] if "[" in location else []))
    names = {"inner.test": [["10.0.0.5"]]}
    url = f"http://{PUBLIC}/to?{quote(location)}"
    outcome = network.chat("strict", url, names)
    assert "redirects" in forbidden(outcome) or "inner.test" in location
    assert outcome.dialled == [PUBLIC]
    assert len(network.chat("lifted", url, names).dialled) >= 2


@pytest.mark.parametrize("location", ["file:///etc/passwd", "gopher://10.0.0.5/", "data:image/png;base64,AA=="])
def test_a_redirect_to_what_is_no_web_address_is_the_hosts_fault(network, location):
    outcome = network.chat("strict", f"http://{PUBLIC}/to?{quote(location)}")
    assert (outcome.status, outcome.error["param"]) == (422, PART)
    assert outcome.dialled == [PUBLIC]


def test_a_name_that_changes_its_answer_is_judged_by_the_one_that_is_dialled(network):
    names = {"rebind.test": [[PUBLIC], ["169.254.169.254"]]}
    outcome = network.chat("strict", "http://rebind.test/cat.png", names)
    assert (outcome.status, outcome.dialled) == (200, [PUBLIC])
    assert sorted(outcome.asked) == ["rebind.test"] * 2, "each family once, and nobody asked again"


def test_a_name_that_means_something_else_at_the_next_hop_is_refused_there(network):
    names = {"rebind.test": [[PUBLIC], ["169.254.169.254"]]}
    url = f"http://rebind.test/to?{quote('http://rebind.test/latest/meta-data/')}"
    outcome = network.chat("strict", url, names)
    forbidden(outcome)
    assert outcome.dialled == [PUBLIC]
    assert network.chat("lifted", url, names).dialled == [PUBLIC, "169.254.169.254"]


def test_a_name_that_nobody_knows_is_a_bad_gateway(network):
    outcome = network.chat("strict", "http://unknown.test/cat.png")
    assert (outcome.status, outcome.dialled) == (502, [])


@pytest.mark.parametrize("namespaces", [[], ["--net"], ["--mount"]])
def test_what_prepares_the_network_refuses_to_start_in_namespaces_of_the_test(namespaces):
    unshare, *given, python, script, outside, _ = isolation.command("true")
    mapped = [option for option in given if option not in {"--net", "--mount"}]
    unshared = [unshare, *mapped, *namespaces] if namespaces else []
    done = subprocess.run([*unshared, python, script, outside, "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "still the network, or the file system, that the test runs in" in done.stderr
