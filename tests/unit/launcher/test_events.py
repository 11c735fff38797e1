from __future__ import annotations

import os

from vllm_pd.launcher.events import (
    DeploymentFailed,
    DeploymentReady,
    Event,
    EventParser,
    EventWriter,
    ProcessChanged,
)


def test_events_survive_the_pipe_in_any_pieces() -> None:
    read_fd, write_fd = os.pipe()
    writer = EventWriter(write_fd)
    sent: list[Event] = [
        ProcessChanged("router", "ready"),
        DeploymentFailed("why", "x"),
        DeploymentReady(),
    ]
    for event in sent:
        writer.send(event)
    writer.close()
    parser = EventParser()
    received = []
    while data := os.read(read_fd, 7):
        received += parser.feed(data)
    os.close(read_fd)
    assert received == sent


def test_a_reader_that_has_gone_is_no_error() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    writer = EventWriter(write_fd)
    writer.send(DeploymentReady())
    writer.send(DeploymentReady())
    writer.close()


def test_without_a_pipe_events_go_nowhere() -> None:
    EventWriter(None).send(DeploymentReady())
