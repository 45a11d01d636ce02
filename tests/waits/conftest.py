# SPDX-License-Identifier: BSD-3-Clause
"""A hub and its peers in one process."""

import selectors
import socket
import time

import pytest

from syncbn.waits.channel import LOOPBACK, Hub, Link, listen

KEY = "4711"


class Bench:
    """A hub, and who connects to it."""

    def __init__(self, size):
        self.hub, self.selector, self.opened = Hub(listen(LOOPBACK, backlog=size), KEY, size), None, []
        self.port = self.hub.listener.getsockname()[1]
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.hub.listener, selectors.EVENT_READ, (self.hub.accept,))

    def link(self, rank, key=KEY):
        link = Link(LOOPBACK, self.port, key, rank)
        self.opened.append(link.connection)
        self.selector.register(link.connection, selectors.EVENT_READ, (link.hear,))
        return link

    def raw(self, *parts):
        """Connects as no rank would."""
        connection = socket.create_connection((LOOPBACK, self.port), 5)
        self.opened.append(connection)
        for part in parts:
            connection.sendall(part)
        return connection

    def pump(self, until=lambda: False, seconds=5.0):
        """Does what the watchdog's thread does. Returns whether what is waited for has come."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            for key, _ in self.selector.select(0.01):
                hear, *arguments = key.data
                hear(*arguments, self.selector)
        return bool(until())

    def has(self, rank, text):
        return self.pump(lambda: self.hub.texts.get(rank) == text)

    def close(self):
        for peer in list(self.hub._peers):
            peer.connection.close()
        for each in (*self.opened, self.hub.listener, self.selector):
            each.close()


@pytest.fixture
def bench():
    made = []

    def make(size=3):
        made.append(Bench(size))
        return made[-1]

    yield make
    for each in made:
        each.close()
