"""Who is told of a release."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from federation.errors import ConfigError, PoolError, RunError
from federation.exchange import Letter, Refusal
from federation.pool.file import PoolFile
from tests.server.live.small_federation import (
    assert_same,
    begun,
    fake_nodes,
    history,
    live_config,
    plain,
    run,
)


@pytest.fixture
def release() -> PoolFile:
    config = live_config()
    return PoolFile(7, begun(config)[1].values, config.task)


def lost(letter: Letter) -> bool:
    return letter.kind != "release"


def test_a_release_goes_once_to_each_node_and_holds_nobody_up(tmp_path: Path, release: PoolFile) -> None:
    nodes = fake_nodes()
    nodes.nodes[31].hears = lost
    nodes.nodes[23].release = release.version
    assert_same(run(nodes, tmp_path, released=lambda: release), plain(live_config()))
    assert nodes.asked_of("release") == {31: 1, 12: 1}
    assert {letter.instructions.version for letter in nodes.letters("release")} == {release.version}
    assert nodes.nodes[12].release == release.version
    assert all(line["seconds"] < 3 for line in history(tmp_path))


def test_every_release_is_told_and_what_a_node_keeps_is_not_sent(tmp_path: Path, release: PoolFile) -> None:
    other = PoolFile(8, release.values, release.task)
    nodes = fake_nodes()
    for node in nodes.nodes.values():
        node.pools[release.version] = release
    ended: list[int] = []
    run(nodes, tmp_path, released=lambda: other if len(ended) > 2 else release, on_round=lambda line: ended.append(1))
    assert nodes.asked_of("release") == {31: 2, 12: 2, 23: 2}
    sent = [(letter.instructions.version, letter.pool is not None) for letter in nodes.letters("release", 12)]
    assert sent == [(release.version, False), (other.version, True)]
    assert {node.release for node in nodes.nodes.values()} == {other.version}


@pytest.mark.parametrize("heard", [True, False])
def test_a_release_that_is_rolled_back_to_is_told_again(tmp_path: Path, release: PoolFile, heard: bool) -> None:
    other = PoolFile(8, release.values, release.task)
    nodes, ended = fake_nodes(), []
    for node in nodes.nodes.values():
        node.release = release.version
    if not heard:  # nobody knows whether the letter or the answer was lost
        nodes.nodes[12].changed = lambda letter, answer: None if letter.kind == "release" else answer
    released = {2: other, 3: other}
    run(nodes, tmp_path, released=lambda: released.get(len(ended), release), on_round=ended.append)
    versions = [letter.instructions.version for letter in nodes.letters("release", 12)]
    assert versions == [other.version, release.version]
    assert {node.release for node in nodes.nodes.values()} == {release.version}


def test_a_node_that_keeps_the_release_no_longer_is_sent_it(tmp_path: Path, release: PoolFile) -> None:
    nodes = fake_nodes()
    nodes.nodes[12].versions_said = (release.version,)
    run(nodes, tmp_path, released=lambda: release)
    assert [letter.pool is not None for letter in nodes.letters("release", 12)] == [False, True]
    assert nodes.nodes[12].release == release.version


def test_a_letter_that_was_lost_is_sent_again_after_a_rounds_time(tmp_path: Path, release: PoolFile) -> None:
    nodes, config = fake_nodes(), live_config("federation.rounds=40")
    nodes.nodes[12].hears = lambda letter: letter.kind != "release" or nodes.time.now > 30
    run(nodes, tmp_path, config, released=lambda: release)
    sent = [moment for moment, to, letter in nodes.posted if letter.kind == "release" and to == 12]
    assert len(sent) == 3
    assert all(20 <= later - sooner < 22 for sooner, later in itertools.pairwise(sent))
    assert nodes.nodes[12].release == release.version
    assert not nodes.waiting


@pytest.mark.parametrize("answered", [Refusal("busy", "later"), "nothing that a node sends"])
def test_whoever_does_not_say_that_it_serves_the_release_is_told_again_in_the_next_round(
    tmp_path: Path, release: PoolFile, answered: Refusal | str
) -> None:
    nodes, ended = fake_nodes(), []
    nodes.nodes[12].changed = lambda letter, answer: answered if letter.kind == "release" and len(ended) < 2 else answer
    run(nodes, tmp_path, released=lambda: release, on_round=ended.append)
    assert nodes.asked_of("release") == {31: 1, 12: 3, 23: 1}


def test_a_node_that_keeps_to_another_release_is_told_again(tmp_path: Path, release: PoolFile) -> None:
    nodes = fake_nodes()
    nodes.nodes[12].changed = lambda letter, answer: (
        replace(answer, release="r1-other") if letter.kind == "release" else answer
    )
    run(nodes, tmp_path, released=lambda: release)
    assert nodes.asked_of("release") == {31: 1, 12: 5, 23: 1}


@pytest.mark.parametrize(
    "error", [RunError("r20 is damaged"), ConfigError("current.json: history"), PoolError("cut"), PermissionError("no")]
)
def test_a_release_that_cannot_be_read_is_said_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def released() -> PoolFile:
        raise error

    nodes = fake_nodes()
    assert_same(run(nodes, tmp_path, released=released), plain(live_config()))
    assert caplog.text.count(f"no release is announced: {error}") == 5
    assert not nodes.letters("release")
