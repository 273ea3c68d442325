"""Follows the kernel: events, and dumps where an event may be missing, keep the models equal and mark tunnels dirty."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from vppipsec.conf.settings import NetlinkSettings
from vppipsec.kernel.xfrm.events import Event, Migrated, SaAdded
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.kernel.xfrm.socket import Overflow
from vppipsec.kernel.xfrm.values import Policy, Sa
from vppipsec.sync.actual.vtis import Vtis
from vppipsec.sync.ike.sa_usage import SaUsage
from vppipsec.sync.journal import Counters, Journal, JournalSource, count_text
from vppipsec.sync.work_queue import WorkQueue

log = logging.getLogger(__name__)

DUMP_RETRY_S = 1.0


class KernelSource(Protocol):
    """The source of the kernel's messages: `vppipsec.kernel.xfrm.socket.XfrmSocket`, or a substitute in tests."""

    async def read(self, limit: int) -> list[Event | Overflow]:
        """Wait for at least one event, and return at most `limit`."""

    async def dump_sas(self) -> list[Sa]:
        """Return all SAs, newest first."""

    async def dump_policies(self) -> list[Policy]:
        """Return all policies."""

    async def expire(self, sa: Sa, hard: bool = False) -> None:
        """Send the kernel an EXPIRE for an SA: a soft one makes the IKE daemon rekey it. Raises OSError."""

    async def has_sent(self, sa: Sa) -> bool:
        """Return whether the kernel has sent with an SA so far. Raises OSError and ValueError."""

    async def acquire(self, policy: Policy) -> None:
        """Ask the IKE daemon, through the kernel, for the SAs of a policy. Raises OSError."""


class KernelWatcher:
    """Keeps the model of SAs and policies, and that of the routes over VTIs, equal to the kernel."""

    def __init__(
        self,
        source: KernelSource,
        netlink: NetlinkSettings,
        model: KernelModel,
        vtis: Vtis,
        sa_usage: SaUsage,
        work_queue: WorkQueue,
        journal: Journal,
        counters: Counters,
    ) -> None:
        """`source` delivers the kernel's messages; the other arguments receive what they say."""
        self.netlink = netlink
        self._source = source
        self._model = model
        self._vtis = vtis
        self._sa_usage = sa_usage
        self._work_queue = work_queue
        self._journal = journal
        self._counters = counters
        self._known = asyncio.Event()
        self._resync_wanted = asyncio.Event()
        self._deferred: list[Event | Overflow] | None = None
        self._sa_problem = ""

    @property
    def problem(self) -> str:
        """Why the kernel cannot be followed, as a sentence; empty where it can."""
        return self._sa_problem or self._vtis.problem

    @property
    def is_current(self) -> bool:
        """True when both models were read in full and no further dump is requested."""
        return self._known.is_set() and self._vtis.known.is_set() and not self._resync_wanted.is_set()

    async def wait_until_known(self) -> None:
        """Return once both models were read."""
        await self._known.wait()
        await self._vtis.known.wait()

    def request_resync(self) -> None:
        """Dump the kernel's tables again, and check everything again."""
        self._resync_wanted.set()

    async def follow(self) -> None:
        """Read events for ever."""
        while True:
            try:
                events = await self._source.read(self.netlink.batch_size)
            except OSError as error:
                self._note_problem(f"the netlink socket cannot be read: {error.strerror or error}")
                await asyncio.sleep(DUMP_RETRY_S)
                self.request_resync()
                continue
            if self._deferred is not None:
                self._deferred += events
            else:
                self._apply(events)

    async def follow_routes(self) -> None:
        """Read changes of the routes over VTIs for ever."""
        vtis = self._vtis
        while True:
            try:
                await vtis.next_change(self.netlink.batch_size)
            except (OSError, ValueError, TimeoutError) as error:
                problem = f"the kernel's routes over VTIs cannot be read: {error}"
                self._log_problem(problem, vtis.problem)
                vtis.problem = problem
                await asyncio.sleep(DUMP_RETRY_S)
            self._work_queue.wake.set()

    async def resync(self) -> None:
        """Dump the kernel's tables on request, and every `resync_interval_s`, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.netlink.resync_interval_s):
                    await self._resync_wanted.wait()
            try:
                await self._dump()
            except (OSError, ValueError, TimeoutError) as error:
                self._note_problem(f"the kernel's SAs cannot be read: {error}")
                self._resync_wanted.set()
                await asyncio.sleep(DUMP_RETRY_S)

    def _apply(self, events: Sequence[Event | Overflow]) -> None:
        """Apply events to the model."""
        counters = self._counters
        changes = self._model.policy_changes
        self._journal.note_events(events, self._model)
        for event in events:
            if isinstance(event, Overflow):
                counters.overflows += 1
                log.warning(
                    "the kernel dropped netlink messages because they were not read in time; reading everything anew"
                )
                self.request_resync()
                continue
            if isinstance(event, Migrated):
                self.request_resync()
            elif isinstance(event, SaAdded):
                self._sa_usage.note_added_by_kernel(event.sa)
            counters.events += 1
            self._work_queue.mark_dirty(self._model.apply(event))
        if self._model.policy_changes != changes:
            self._work_queue.wake.set()  # a policy without a template belongs to no tunnel
        if events:
            counters.last_event = time.time()
            counters.last_event_name = type(events[-1]).__name__

    async def _dump(self) -> None:
        """Dump. Events that come meanwhile are applied afterwards, since a dump may miss them."""
        self._resync_wanted.clear()
        self._deferred = []
        try:
            sas = await self._source.dump_sas()
            policies = await self._source.dump_policies()
            changed = self._model.replace(sas, policies)
            self._work_queue.mark_dirty(changed)
            self._sa_usage.retain_only(sas)
            if changed:
                line = f"its tables, read in full, told of changes in {count_text(len(changed), 'tunnel')}"
                self._journal.note(JournalSource.KERNEL, line)
        finally:
            deferred, self._deferred = self._deferred, None
            self._apply(deferred)
        self._sa_problem = ""
        self._vtis.resync()
        self._counters.resyncs += 1
        self._counters.last_resync = time.time()
        self._known.set()
        self._work_queue.request_environment_read()

    def _note_problem(self, problem: str) -> None:
        self._log_problem(problem, self._sa_problem)
        self._sa_problem = problem

    def _log_problem(self, problem: str, before: str) -> None:
        if problem != before:
            log.error("%s", problem)
            self._journal.note(JournalSource.KERNEL, problem)
