# SPDX-License-Identifier: BSD-3-Clause
"""Which address each host gets follows from what all of them offer."""

import os
import socket

import pytest

from syncbn.transports import addresses, interfaces, reach
from syncbn.transports.addresses import NoAddressError, Offer
from syncbn.transports.interfaces import Interface

DOCKER = Interface("docker0", "172.17.0.1", "172.17.0.0/16")


def eth(last, net=0):
    return Interface(f"eth{net}", f"10.0.{net}.{last}", f"10.0.{net}.0/24")


def offer(number, *found):
    return Offer(f"host {number}", f"h{number}", list(found), "127.0.1.1")


@pytest.mark.parametrize(
    ("offers", "expected"),
    [
        ([offer(1, eth(1)), offer(1, eth(1))], ["127.0.0.1"] * 2),
        ([offer(1, eth(1)), offer(2, eth(2)), offer(1, eth(1))], ["10.0.0.1", "10.0.0.2", "10.0.0.1"]),
        # every host has this bridge, at one address
        ([offer(1, DOCKER, eth(1)), offer(2, DOCKER, eth(2))], ["10.0.0.1", "10.0.0.2"]),
        # the first network of rank 0's host is not one of the other host
        ([offer(1, eth(1, 1), eth(1)), offer(2, eth(2), eth(2, 2))], ["10.0.0.1", "10.0.0.2"]),
        # each host in a network of its own, with a router between them
        ([offer(1, DOCKER, eth(1)), offer(2, DOCKER, eth(2, 1))], ["10.0.0.1", "10.0.1.2"]),
    ],
)
def test_all_ranks_agree_on_addresses_by_which_hosts_reach_each_other(offers, expected):
    assert addresses.agree(offers) == expected


@pytest.mark.parametrize("found", [(), (DOCKER,)])
def test_a_host_without_an_address_of_its_own_is_an_error_with_what_it_has(found):
    with pytest.raises(NoAddressError, match=r"received .* on h2, whose own name means 127.0.1.1 there"):
        addresses.agree([offer(1, DOCKER, eth(1)), offer(2, *found)])


def test_an_offer_survives_as_text_and_leaves_out_what_has_no_place():
    small, large = offer(1, eth(1), DOCKER), offer(1, *(eth(1, net) for net in range(99)))
    assert Offer.read(small.text()) == small
    assert len(large.text()) <= 950
    assert 5 < len(Offer.read(large.text()).addresses) < 99
    assert Offer.read(large.text()).addresses[0] == eth(1)


def test_this_host_offers_addresses_that_are_its_own(monkeypatch):
    monkeypatch.delenv(addresses.GLOO_INTERFACE, raising=False)
    own = addresses.own()
    assert (own.name, own.error) == (socket.gethostname(), "")
    for each in own.addresses:
        family = socket.AF_INET6 if ":" in each.address else socket.AF_INET
        with socket.socket(family) as bound:
            bound.bind((each.address, 0))  # another host's cannot be bound
        assert each.name in [name for _, name in socket.if_nameindex()]
    assert addresses.own().host == own.host


def test_an_interface_that_is_not_there_is_an_error_with_those_that_are(monkeypatch):
    monkeypatch.setenv(addresses.GLOO_INTERFACE, "nope")
    own = addresses.own()
    assert own.error.startswith("GLOO_SOCKET_IFNAME must name a network interface of each host; received 'nope' on ")
    monkeypatch.setenv(addresses.GLOO_INTERFACE, "lo")
    assert addresses.own().error == ""


def test_gloo_is_told_the_interface_unless_the_user_has_named_one(monkeypatch):
    monkeypatch.setattr(interfaces, "interfaces", lambda: [DOCKER, eth(1)])
    monkeypatch.setenv(addresses.GLOO_INTERFACE, "mine")
    addresses.tell_gloo("10.0.0.1")
    assert os.environ[addresses.GLOO_INTERFACE] == "mine"
    for address, name in (("10.0.0.1", "eth0"), ("127.0.0.1", "lo")):
        monkeypatch.delenv(addresses.GLOO_INTERFACE)
        addresses.tell_gloo(address)
        assert os.environ[addresses.GLOO_INTERFACE] == name


def test_the_route_to_the_master_comes_first_and_bridges_of_containers_last(monkeypatch):
    routes = {"10.0.1.9": "10.0.1.1", "192.0.2.1": "10.0.2.1"}
    monkeypatch.setattr(interfaces, "toward", lambda address: routes.get(address, ""))
    monkeypatch.setattr(interfaces, "interfaces", lambda: [DOCKER, eth(1), eth(1, 1), eth(1, 2)])
    assert interfaces.ordered("10.0.1.9") == [eth(1, 1), eth(1, 2), eth(1), DOCKER]
    assert interfaces.ordered() == [eth(1, 2), eth(1), eth(1, 1), DOCKER]


def test_a_name_that_means_nothing_is_an_error_that_names_the_variable():
    with pytest.raises(RuntimeError, match=r"MASTER_ADDR must be .* received 'no\.such\.host\.invalid', which means"):
        reach.resolve("no.such.host.invalid", "MASTER_ADDR", limit=0)
    assert reach.resolve("localhost", "MASTER_ADDR") in ("127.0.0.1", "::1")


def test_an_attempt_tells_a_port_that_refuses_from_one_that_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert reach.attempt("127.0.0.1", port) == reach.REACHED
    assert reach.attempt("127.0.0.1", port) == reach.REFUSED
