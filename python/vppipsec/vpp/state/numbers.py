"""Hands out SA numbers and instances of `ipsec` interfaces that nobody uses."""

from __future__ import annotations

from collections.abc import Iterable

from vppipsec.vpp.ownership import INSTANCES, SAD_ID_FIRST, SAD_ID_LAST


class NumbersExhausted(Exception):
    """VPP has no room for another SA or interface of ours."""


class NumberPools:
    """Hands out `sad_id`s and interface instances that nobody uses. A number that was given back comes again last."""

    def __init__(self, sad_ids: Iterable[int] = (), instances: Iterable[int] = ()) -> None:
        """Take the numbers that are in use already; those outside of our ranges don't count."""
        self._sad_ids = _Pool(range(SAD_ID_FIRST, SAD_ID_LAST + 1), sad_ids, "SAs")
        self._instances = _Pool(INSTANCES, instances, "ipsec interfaces")

    def shortage(self, sad_ids: int, instances: int) -> str:
        """Return why so many numbers cannot be had, as a sentence; nothing where they can."""
        for pool, count in ((self._sad_ids, sad_ids), (self._instances, instances)):
            if count > len(pool.numbers) - len(pool.taken):
                return pool.shortage
        return ""

    def sad_id(self) -> int:
        """Return a free `sad_id` of our range and take it. Raises NumbersExhausted."""
        return self._sad_ids.take()

    def instance(self) -> int:
        """Return a free instance of `ipsec` interface and take it. Raises NumbersExhausted."""
        return self._instances.take()

    def free_sad_id(self, sad_id: int) -> None:
        """Give a `sad_id` back."""
        self._sad_ids.taken.discard(sad_id)

    def free_instance(self, instance: int) -> None:
        """Give an instance back."""
        self._instances.taken.discard(instance)


class _Pool:
    """Numbers of a range, handed out in turn. `shortage` is the sentence that tells how many there are."""

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
