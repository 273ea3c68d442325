"""The fuzzers' targets hold for what they begin with, and for a bounded number of inputs beyond that."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.fuzz_targets import TARGETS, status_seeds, status_server
from support.recorded import PATIENCE_S

pytestmark = pytest.mark.versions

HERE = Path(__file__).resolve().parent
RUNS = 4000


@pytest.mark.parametrize("name", TARGETS)
def test_target_holds_for_its_seeds(name: str) -> None:
    make, seeds = TARGETS[name]
    ran = 0
    with make() as run:
        for seed in seeds():
            run(seed)
            run(seed[: len(seed) // 2])
            ran += 1
    assert ran > 10


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="the packages `fuzz` are not installed: atheris"
)
@pytest.mark.parametrize("name", TARGETS)
def test_bounded_run_of_the_fuzzer_finds_nothing(name: str) -> None:
    command = [sys.executable, HERE / "run.py", "--runs", str(RUNS), name]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = re.fullmatch(
        rf"{name} +([0-9,]+) executions, ([0-9,]+) edges, memory \d+ to \d+ MiB: nothing found\n", ran.stdout
    )
    assert told is not None, ran.stdout
    executions, edges = (int(number.replace(",", "")) for number in told.groups())
    assert executions >= RUNS
    assert edges > 50


def test_status_socket_answers_after_whatever_it_was_asked() -> None:
    async def ask(path: str, data: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            writer.write(data)
            writer.write_eof()
            return await reader.read()
        return b""  # the server had heard enough

    async def story() -> None:
        rng, seeds, good = random.Random(7), list(status_seeds()), 0
        async with status_server() as server:
            await server.start()
            for _ in range(500):
                data = bytearray(rng.choice(seeds))
                for _ in range(rng.randrange(3)):
                    data[rng.randrange(len(data) + 1) :] = rng.randbytes(rng.choice((0, 1, 5, 9000)))
                answer = await ask(server.path, bytes(data))
                good += bool(answer) and "answer" in json.loads(answer)
            assert good > 50
            assert json.loads(await ask(server.path, b'{"ask": "show sync"}\n'))["answer"]["kernel"]["sas"] == 7
            await server.stop()

    asyncio.run(asyncio.wait_for(story(), PATIENCE_S))
