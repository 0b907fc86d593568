"""Fairness: senders are served in turn, and under overload the sender that causes it is refused."""

from __future__ import annotations

from collections import Counter

import pytest

from app.web.batching import Unavailable
from app.web.fair_queue import FairQueue, sender_of
from db.settings import Settings
from tests.api.test_batching import (
    MAKE_ECHO,
    EchoRequest,
    acquire_lock,
    echoed_texts,
    opened_batching,
    release_lock,
    until,
    waiting,
)
from tests.support.payments import Connection


def filled(**counts: int) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for sender, count in counts.items():
        for number in range(count):
            queue.append(sender.encode(), f"{sender}{number}")
    return queue


def test_senders_are_served_in_turn_and_each_in_its_order() -> None:
    queue = filled(a=5, b=1, c=2)
    assert queue.take(4, 10) == ["a0", "b0", "c0", "a1"]
    # The next batch goes on with the sender whose turn it is.
    assert queue.take(2, 10) == ["c1", "a2"]
    assert (len(queue), queue.oldest) == (2, "a3")
    assert queue.take(10, 10) == ["a3", "a4"]
    assert (len(queue), queue.take(10, 10)) == (0, [])


def test_a_batch_takes_a_bounded_part_of_one_sender() -> None:
    queue = filled(a=5, b=1)
    assert queue.take(10, 2) == ["a0", "b0", "a1"]
    assert queue.take(10, 2) == ["a2", "a3"]


def test_the_oldest_item_is_the_one_that_arrived_first_of_those_left() -> None:
    queue = filled(a=2, b=2)
    queue.take(3, 10)
    assert queue.oldest == "b1"
    queue.append(b"a", "later")
    assert (queue.oldest, queue.newest) == ("b1", "later")


@pytest.mark.parametrize("header", [b"Bearer sty_x", b"bearer   sty_x", b"Bearer sty_x \t", b"sty_x"])
def test_a_sender_can_not_appear_as_several_by_spelling(header: bytes) -> None:
    assert sender_of(header) == b"sty_x"
    assert sender_of(b"") == b""
    assert sender_of(b"  ") == b""


async def test_under_overload_the_noisy_sender_is_refused_and_the_quiet_one_is_not(
    conn: Connection, settings: Settings
) -> None:
    conn.execute(MAKE_ECHO.encode())
    acquire_lock(conn)
    async with opened_batching(settings, connections=1, sustained_max=8) as batching:
        answers = [batching.submit(EchoRequest(f"noisy{n}"), b"noisy") for n in range(40)]
        await until(lambda: waiting(conn))
        await until(lambda: batching.is_full(b"noisy"))
        with pytest.raises(Unavailable):
            batching.submit(EchoRequest("noisy"), b"noisy")
        answers.append(batching.submit(EchoRequest("quiet"), b"quiet"))
        # Each of nine senders would have less than one of eight requests.
        answers += [batching.submit(EchoRequest(f"other{n}"), b"other %d" % n) for n in range(6)]
        assert batching.is_full(b"a ninth")
        release_lock(conn)
        for answer in answers:
            await answer
    assert Counter(text.rstrip("0123456789") for text in echoed_texts(conn)) == {"noisy": 40, "quiet": 1, "other": 6}
