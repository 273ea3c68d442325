#!/usr/bin/env python3
"""Checks IPsec acceleration on a running VyOS router over its HTTPS API: set, commit, compare, show, and all as it was again.

    VYOS_API_KEY=... smoketest/remote.py ROUTER [--port 443] [--ca FILE | --insecure] [--switch]

Without --switch only options of `vpp ipsec` are changed, which interrupts nothing. With it acceleration is turned on (where it is
off) and off again; on images whose VPP settings belong to VyOS that restarts VPP. Exit status 0 only if every step held.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pyvyos import VyDevice

OPTIONS = ("vpp", "ipsec")
SWITCH = ("vpp", "settings", "ipsec-acceleration")
PROBES = {"restart-rekey-rate": ("77", "78"), "statistics-interval": ("33", "34")}
"""Two values for each option: the second is taken where the router has the first already."""
REFUSED = (("restart-rekey-rate", "0"), ("statistics-interval", "3601"), ("unsupported", "forward"))
VIEWS = ("summary", "sa", "policy", "tunnel", "events", "counters")


class Failed(Exception):
    """A step did not hold; the text says what the router did."""


class Router:
    """The router's API, with refusals and losses of the connection as one kind of error."""

    def __init__(self, device: VyDevice) -> None:
        self._device = device

    def config(self, path: Sequence[str]) -> Any:
        """Return the configuration below a path, None where there is none. Raises Failed."""
        # all of it: of a path that is not configured VyOS says 400, and pyvyos not why
        answer = self._ask(self._device.retrieve_show_config, [])
        if answer.error:
            raise Failed(f"the router does not show its configuration: {answer.error}")
        below: Any = answer.result
        for word in path:
            if not isinstance(below, dict) or word not in below:
                return None
            below = below[word]
        return below

    def commit(self, operations: list[dict[str, Any]]) -> str:
        """Set and delete, which commits; return the router's complaint, nothing where it accepted."""
        answer = self._ask(self._device.configure_multiple_op, operations)
        return str(answer.error).strip() if answer.error else ""

    def show(self, path: Sequence[str]) -> str:
        """Run an op-mode command and return its text. Raises Failed."""
        answer = self._ask(self._device.show, list(path))
        if answer.error:
            raise Failed(f"'show {' '.join(path)}' was refused: {answer.error}")
        return str(answer.result)

    @staticmethod
    def _ask(call: Callable[[Any], Any], argument: Any) -> Any:
        try:
            answer = call(argument)
        except Exception as error:  # pyvyos and requests have many; for this check they are one: no answer
            raise Failed(f"the router does not answer: {error}") from error
        if answer.status in (401, 403):
            raise Failed("the router refuses the API key")
        return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps. Returns 0 if every one held, 1 if one did not, 2 where the key is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("router")
    parser.add_argument("--port", type=int, default=443)
    parser.add_argument("--ca", help="certificate that the router's is checked against")
    parser.add_argument("--insecure", action="store_true", help="do not check the router's certificate")
    parser.add_argument("--switch", action="store_true", help="turn acceleration on and off as well")
    arguments = parser.parse_args(argv)
    key = os.environ.get("VYOS_API_KEY", "")
    if not key:
        print("VYOS_API_KEY does not hold the router's API key", file=sys.stderr)
        return 2
    if arguments.ca:
        os.environ["REQUESTS_CA_BUNDLE"] = arguments.ca
    device = VyDevice(arguments.router, key, port=arguments.port, verify=not arguments.insecure, timeout=60)
    try:
        check(Router(device), arguments.switch)
    except Failed as failure:
        print(f"FAILED: {failure}")
        return 1
    print("All held; the router is as it was.")
    return 0


def check(router: Router, switch: bool) -> None:
    """Run the steps, and put everything back whatever happens. Raises Failed."""
    before = {path: router.config(path) for path in (OPTIONS, SWITCH)}
    try:
        if switch and before[SWITCH] is None:
            _accept(router, [{"op": "set", "path": list(SWITCH)}], "acceleration is on")
        _options(router, before[OPTIONS] or {})
        _refusals(router)
        if switch or before[SWITCH] is not None:
            _views(router)
        if switch:
            _accept(router, [{"op": "delete", "path": list(SWITCH)}], "acceleration is off")
    finally:
        _restore(router, before)


def _options(router: Router, before: dict[str, Any]) -> None:
    wanted = {name: next(v for v in values if v != before.get(name)) for name, values in PROBES.items()}
    operations = [{"op": "set", "path": [*OPTIONS, name, value]} for name, value in wanted.items()]
    _accept(router, operations, "options are taken")
    now = router.config(OPTIONS) or {}
    for name, value in wanted.items():
        if str(now.get(name)) != value:
            raise Failed(f"{name} was set to {value}, and is {now.get(name)}")
    print("ok   options are as they were set")


def _refusals(router: Router) -> None:
    for name, value in REFUSED:
        before = router.config(OPTIONS)
        complaint = router.commit([{"op": "set", "path": [*OPTIONS, name, value]}])
        if not complaint:
            raise Failed(f"'{name} {value}' was accepted")
        if router.config(OPTIONS) != before:
            raise Failed(f"'{name} {value}' was refused, and changed the configuration")
        print(f"ok   '{name} {value}' is refused: {complaint.splitlines()[-1]}")


def _views(router: Router) -> None:
    for view in VIEWS:
        if not router.show(("vpp", "ipsec", view)).strip():
            raise Failed(f"'show vpp ipsec {view}' says nothing")
    print(f"ok   show vpp ipsec {' | '.join(VIEWS)}")
    print("\n".join(f"     {line}" for line in router.show(("vpp", "ipsec", "summary")).splitlines()))


def _accept(router: Router, operations: list[dict[str, Any]], what: str) -> None:
    if complaint := router.commit(operations):
        raise Failed(f"the router refused a commit: {complaint}")
    print(f"ok   {what}")


def _restore(router: Router, before: dict[tuple[str, ...], Any]) -> None:
    """Put back what was there, and compare."""
    operations: list[dict[str, Any]] = []
    for path, value in before.items():
        if router.config(path) == value:
            continue
        operations.append({"op": "delete", "path": list(path)})
        operations += [{"op": "set", "path": [*path, *words]} for words in _leaves(value)] if value is not None else []
    if operations and (complaint := router.commit(operations)):
        raise Failed(f"the router could not be put back: {complaint}")
    for path, value in before.items():
        if router.config(path) != value:
            raise Failed(f"'{' '.join(path)}' is not as it was")


def _leaves(value: Any) -> list[list[str]]:
    """Return the words of each leaf of a configuration tree; a valueless leaf, or an empty node, ends there."""
    if isinstance(value, dict) and value:
        return [[name, *words] for name, below in value.items() for words in _leaves(below)]
    if isinstance(value, list):
        return [[str(item)] for item in value]
    return [[]] if value in ({}, None) else [[str(value)]]


if __name__ == "__main__":
    sys.exit(main())
