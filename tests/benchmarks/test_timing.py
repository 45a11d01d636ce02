# SPDX-License-Identifier: BSD-3-Clause
"""How `python -m benchmarks.gpu` counts the events of a profile, and captures steps."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu.timing import MARK, Capturer, Counts, counted


def event(name, start, end, *, gpu=False, annotation=False):
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotation, time_range=span)


def test_events_count_for_the_method_whose_turn_it_was():
    events = [
        event(MARK + "a", 2000, 2100),
        event(MARK + "a", 2001, 2300, gpu=True, annotation=True),
        event("kernel", 2050, 2150, gpu=True),
        event("kernel", 2200, 2300, gpu=True),  # when the host had launched everything
        event("cudaDeviceSynchronize", 2101, 2301),  # the bench's own
        event(MARK + "b", 3400, 3500),
        event("cudaStreamSynchronize", 3450, 3460),
        event("cudaLaunchKernel", 3461, 3462),
        event("Memcpy DtoH", 3399, 3405, gpu=True),  # by a clock that is some microseconds behind
    ]
    found = counted(events, 2)
    assert found == {"a": Counts(100.0, 1.0, 0.0), "b": Counts(3.0, 0.5, 0.5)}
    assert counted(events[:1], 2) == {}, "no GPU seen"


@pytest.fixture
def one_stream(monkeypatch):
    """Streams as names, and the one that is current."""
    current = ["mine"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return current


def test_a_capture_that_fails_leaves_stream_and_others_alone_and_is_not_tried_again(monkeypatch, one_stream):
    tried = []

    def captured(self, step):
        tried.append(step())
        one_stream[0] = "the capture's"
        if step() == "waits":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return SimpleNamespace(replay=step, reset=lambda: tried.append(f"{step()} reset"))

    monkeypatch.setattr(Capturer, "captured_step", captured)
    capturer, steps = Capturer(), {"a": lambda: "waits", "b": lambda: "runs"}
    assert list(capturer.replays(steps, 1)) == ["b"]
    assert list(capturer.replays(steps, 1)) == ["b"]
    assert one_stream == ["mine"]
    assert tried == ["waits", "runs", "runs reset", "runs", "runs reset"]
    assert capturer.refused == {"a": "operation not permitted"}
