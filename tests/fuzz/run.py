"""Coverage-guided fuzzing (atheris) of what takes bytes from others: netlink messages, questions for status, VPP's answers.

    python tests/fuzz/run.py [--seconds 600 | --runs 10000] [--keep DIRECTORY] [wire] [status] [vpp]

Needs the optional packages `fuzz` of pyproject.toml. Ends with status 0 where nothing was found. What was found is told: a
traceback, and the input in hex.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "python"), str(HERE.parent)]

TARGETS = ("wire", "status", "vpp")
RSS_LIMIT_MB = 256
"""Memory that a target may use, MiB; they start with some 70."""
LONGEST = 8192
"""Longest input, bytes."""
SLOWEST_S = 10
"""How long one input may take."""


@dataclass(frozen=True)
class Result:
    """What came of fuzzing a target. `coverage` counts edges of vppipsec; memory is in MiB, at the start and at the end."""

    target: str
    found: bool
    executions: int
    coverage: int
    memory: tuple[int, int]
    output: str


def fuzz(target: str, corpus: Path, *limits: str) -> Result:
    """Fuzz a target in a process of its own, with limits as libFuzzer takes them."""
    from support.fuzz_targets import write_seeds

    corpus.mkdir(parents=True, exist_ok=True)
    write_seeds(target, corpus)
    options = (
        f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-timeout={SLOWEST_S}",
        f"-max_len={LONGEST}",
        "-print_final_stats=1",
        "-use_value_profile=1",
    )
    command = [
        sys.executable,
        __file__,
        "--child",
        target,
        *options,
        *limits,
        f"-artifact_prefix={corpus.parent}/",
        corpus,
    ]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:  # the child ends at once and leaves what it made
        environment = {**os.environ, "TMPDIR": scratch}
        ran = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            text=True,
            errors="replace",
            env=environment,
        )
    executions = re.findall(r"number_of_executed_units:\s+(\d+)", ran.stdout) or re.findall(
        r"^#(\d+)", ran.stdout, re.M
    )
    coverage = re.findall(r"cov: (\d+)", ran.stdout)
    memory = re.findall(r"rss: (\d+)Mb", ran.stdout)
    return Result(
        target,
        bool(ran.returncode),
        int(executions[-1]) if executions else 0,
        int(coverage[-1]) if coverage else 0,
        (int(memory[0]), int(memory[-1])) if memory else (0, 0),
        ran.stdout,
    )


def _child(target: str, options: list[str]) -> None:
    """Be the process that fuzzes: libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["vppipsec"], enable_loader_override=False):
        from support.fuzz_targets import TARGETS

    with TARGETS[target][0]() as run:

        def run_and_tell(data: bytes) -> None:
            try:
                run(data)
            except BaseException:
                print(f"input in hex: {data.hex()}")
                raise

        atheris.Setup([sys.argv[0], *options], run_and_tell)
        try:
            atheris.Fuzz()
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(bool(end.code)))  # at once: what the target holds open would only complain


@contextlib.contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
            yield Path(directory)


def main() -> int:
    """Fuzz one target after the other and print what came of it."""
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="how long for each target")
    parser.add_argument("--runs", type=int, help="how many inputs for each target, in place of --seconds")
    parser.add_argument("--keep", type=Path, help="where inputs that reach something new are kept, and read again")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all without")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    limit = f"-max_total_time={arguments.seconds}" if arguments.runs is None else f"-runs={arguments.runs}"
    found = False
    for target in arguments.targets or TARGETS:
        with _directory(arguments.keep) as directory:
            result = fuzz(target, directory / target, limit)
        if result.found:
            noise = ("#", "INFO", "WARNING")
            print("\n".join(line for line in result.output.splitlines() if not line.startswith(noise)))
            for path in (*directory.glob("timeout-*"), *directory.glob("oom-*")):  # told by libFuzzer itself
                print(f"input in hex: {path.read_bytes().hex()}")
        memory = f"memory {result.memory[0]} to {result.memory[1]} MiB"
        decision = "FOUND SOMETHING" if result.found else "nothing found"
        print(
            f"{target:8}{result.executions:>12,} executions, {result.coverage:,} edges, {memory}: {decision}",
            flush=True,
        )
        found |= result.found
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
