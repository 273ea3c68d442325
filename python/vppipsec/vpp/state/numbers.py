"""Pools of free `sad_id`s and free instances of `ipsec` interfaces."""

from __future__ import annotations

from collections.abc import Iterable

from vppipsec.vpp.ownership import INSTANCES, SAD_ID_FIRST, SAD_ID_LAST


class NumbersExhausted(Exception):
    """The service's number range has no free number for another SA or interface."""


class NumberPools:
    """Hands out free `sad_id`s and free instances of `ipsec` interfaces. A number that is given back comes last again."""

    def __init__(self, sad_ids: Iterable[int] = (), instances: Iterable[int] = ()) -> None:
        """Reserve the numbers that are in use already. Numbers outside of the service's ranges do not count."""
        self._sad_ids = _Pool(range(SAD_ID_FIRST, SAD_ID_LAST + 1), sad_ids, "SAs")
        self._instances = _Pool(INSTANCES, instances, "ipsec interfaces")

    def shortage(self, sad_ids: int, instances: int) -> str:
        """Return a sentence if fewer numbers than asked for are free, else an empty string."""
        for pool, count in ((self._sad_ids, sad_ids), (self._instances, instances)):
            if count > len(pool.numbers) - len(pool.taken):
                return pool.shortage
        return ""

    def sad_id(self) -> int:
        """Return and reserve a free `sad_id`. Raises NumbersExhausted."""
        return self._sad_ids.take()

    def instance(self) -> int:
        """Return and reserve a free instance of an `ipsec` interface. Raises NumbersExhausted."""
        return self._instances.take()

    def free_sad_id(self, sad_id: int) -> None:
        """Return a `sad_id` to the pool."""
        self._sad_ids.taken.discard(sad_id)

    def free_instance(self, instance: int) -> None:
        """Return an instance to the pool."""
        self._instances.taken.discard(instance)


class _Pool:
    """Numbers of a range, handed out in turn. `shortage` is the sentence for an exhausted range."""

    def __init__(self, numbers: range, taken: Iterable[int], name: str) -> None:
        self.numbers = numbers
        self.taken = {number for number in taken if number in numbers}
        self.shortage = f"there can be no more than {len(numbers)} {name} of ours in VPP"
        self._next = 0

    def take(self) -> int:
        if len(self.taken) == len(self.numbers):
            raise NumbersExhausted(self.shortage)
        while (number := self.numbers[self._next]) in self.taken:
            self._next = (self._next + 1) % len(self.numbers)
        self._next = (self._next + 1) % len(self.numbers)
        self.taken.add(number)
        return number
