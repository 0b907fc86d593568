"""A queue that serves its senders in turn, so that one with many requests does not delay the others."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


def sender_of(authorization: bytes) -> bytes:
    """The sender of a request as its Authorization header names it: the API key, however the header is spelt."""
    return (authorization.split() or [b""])[-1]


class QueueEntry(Generic[T]):
    """An item in the queue."""

    __slots__ = ("is_taken", "item")

    def __init__(self, item: T) -> None:
        self.item = item
        self.is_taken = False


class FairQueue(Generic[T]):
    """First in, first out for each sender; senders in turn, one item each."""

    def __init__(self) -> None:
        self._by_arrival: deque[QueueEntry[T]] = deque()
        self._by_sender: OrderedDict[bytes, deque[QueueEntry[T]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, sender: bytes, item: T) -> None:
        """Add an item."""
        entry = QueueEntry(item)
        self._by_arrival.append(entry)
        self._by_sender.setdefault(sender, deque()).append(entry)
        self._count += 1

    @property
    def oldest(self) -> T:
        """The item that arrived first."""
        return self._by_arrival[0].item

    @property
    def newest(self) -> T:
        """The item that arrived last, or one that was taken after that."""
        return self._by_arrival[-1].item

    def take(self, items_max: int, of_one_max: int) -> list[T]:
        """Take up to so many items, and of one sender; the next call goes on with the senders whose turn is next."""
        taken: list[T] = []
        for _ in range(of_one_max):
            for sender in list(self._by_sender)[: items_max - len(taken)]:
                line = self._by_sender[sender]
                entry = line.popleft()
                entry.is_taken = True
                taken.append(entry.item)
                if line:
                    self._by_sender.move_to_end(sender)
                else:
                    del self._by_sender[sender]
            if not self._by_sender or len(taken) >= items_max:
                break
        self._count -= len(taken)
        while self._by_arrival and self._by_arrival[0].is_taken:
            self._by_arrival.popleft()
        return taken
