# SPDX-License-Identifier: BSD-3-Clause
"""The identity of a call: one for each layer, group, setting and direction, the same in every process, never copied."""

import copy
import itertools
import pickle

import pytest
import torch

from syncbn import moments
from syncbn.calls import sites
from syncbn.calls.renorm import RenormLimits
from syncbn.calls.sites import Site
from syncbn.moments import BACKWARD, FORWARD, LIMIT
from syncbn.transports.groups import GroupSpec
from tests import processes

SETTINGS = (64, 1e-5, 0.1, True, None)
OTHERS = [
    (65, 1e-5, 0.1, True, None),
    (64, 1e-5 * (1 + 2**-52), 0.1, True, None),
    (64, 1e-5, 0.2, True, None),
    (64, 1e-5, None, True, None),
    (64, 1e-5, 0.1, False, None),
    (64, 1e-5, 0.1, True, RenormLimits(3.0, 0.0)),
    (64, 1e-5, 0.1, True, RenormLimits(1.0, 5.0)),
]
GROUP_ID = 5


def test_every_setting_and_the_name_and_the_order_change_the_hash():
    site = Site("SyncBatchNorm")
    found = [site.hash(settings, GROUP_ID) for settings in (SETTINGS, *OTHERS)]
    for name in ("1", "11", "1|1"):
        site.name = name
        found.append(site.hash(SETTINGS, GROUP_ID))
    site.orders[GROUP_ID] = 1
    found.append(site.hash(SETTINGS, GROUP_ID))
    found.append(Site("another kind").hash(SETTINGS, GROUP_ID))
    assert len(set(found)) == len(found)
    assert all(0 <= part < LIMIT for hash in found for part in hash)


def test_the_hash_follows_every_change_and_comes_back():
    site = Site("SyncBatchNorm")
    first = site.hash(SETTINGS, GROUP_ID)
    for settings in OTHERS:
        assert site.hash(settings, GROUP_ID) != first
        assert site.hash(SETTINGS, GROUP_ID) == first


def test_an_order_that_is_found_after_the_hash_was_asked_for_still_counts():
    """As where activation checkpointing repeats a forward in a group that has not compared settings yet."""
    early, late = Site("SyncBatchNorm"), Site("SyncBatchNorm")
    early.hash(SETTINGS, GROUP_ID)
    for site in (early, late):
        site.orders[GROUP_ID] = 3
    assert early.hash(SETTINGS, GROUP_ID) == late.hash(SETTINGS, GROUP_ID)


def test_the_hash_is_the_same_in_every_process():
    program = "from syncbn.calls.sites import Site; print(Site('SyncBatchNorm').hash((64, 1e-5, 0.1, True, None), 5))"
    ours = Site("SyncBatchNorm").hash(SETTINGS, GROUP_ID)
    done = processes.python("-c", program, PYTHONHASHSEED=1)  # that of this process is random
    assert done.stdout.strip() == str(ours), done.stderr


def test_hashes_of_many_texts_differ():
    assert len({moments.text_hash(f"layer {i}") for i in range(20000)}) == 20000


@pytest.mark.parametrize("settings", [SETTINGS, *OTHERS], ids=str)
def test_settings_come_back_from_what_a_compiled_graph_holds(settings):
    floats = sites.as_floats(settings)
    assert len(floats) == len(sites.SETTINGS)
    assert all(type(value) is float for value in floats)
    assert sites.of_floats(floats) == settings
    assert sites.of_floats(list(floats)) == settings


def test_numbers_stay_below_the_limit_and_tell_directions_and_serials_apart():
    hash = (LIMIT - 1, LIMIT - 1)
    found = {
        moments.numbers(serial, hash, direction)
        for serial, direction in itertools.product((0, 1, LIMIT - 1), (FORWARD, BACKWARD, FORWARD + 2, BACKWARD + 2))
    }
    assert len(found) == 12
    assert all(0 <= n < LIMIT for numbers in found for n in numbers)
    assert all(numbers[0] == 1 for numbers in found)  # it has a say
    assert moments.numbers(LIMIT, hash, FORWARD) == moments.numbers(0, hash, FORWARD)  # and so on for ever


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_copy_is_the_same_layer_and_has_agreed_with_nobody(copier):
    site = Site("SyncBatchNorm", GroupSpec("blocks", (), size=2), replays=False)
    site.name, site.frozen, site.renorm, site.converted_from = "stem", True, (3.0, 5.0), torch.nn.BatchNorm2d
    site.orders[GROUP_ID] = 4
    before = site.hash(SETTINGS, GROUP_ID)
    other = Site.of_state(copier(site.state()))
    for kept in ("kind", "group", "name", "frozen", "replays", "renorm", "converted_from", "compares"):
        assert getattr(other, kept) == getattr(site, kept)
    assert other.orders == {0: 0}
    assert other.number != site.number
    assert sites.of_number(int(other.number)) is other
    assert other.hash(SETTINGS, GROUP_ID) != before
    other.orders[GROUP_ID] = 4
    assert other.hash(SETTINGS, GROUP_ID) == before
    assert site.orders == {0: 0, GROUP_ID: 4}


def test_a_number_finds_its_site_as_long_as_the_layer_lives():
    site = Site("SyncBatchNorm")
    number = int(site.number)
    assert sites.of_number(number) is site
    assert Site("SyncBatchNorm").number != site.number
    del site
    assert sites.of_number(number) is None


def test_notes_tell_layers_of_one_label_apart_and_name_every_setting():
    site = Site("SyncBatchNorm")
    site.orders[GROUP_ID] = 2
    which, settings = site.notes((64, 1e-5, None, True, RenormLimits(3, 5)), GROUP_ID)
    assert which == "layer 2 of the group"
    assert settings == ("num_features=64, eps=1e-05, momentum (-1 is None)=-1, track_running_stats=1, r_max=3, d_max=5")
