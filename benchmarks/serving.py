"""Measure examples/serve.py under load: requests a second and latencies, with and without swaps.

The server runs in a process of its own, 64 clients in this one, over the loopback address. A client
sends its next request when it has the answer to the last one. With swaps, another client puts an
adapter from a folder into a slot, again and again. Every answer is compared with those of the
adapters that its slot has had.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from aiohttp import ClientSession, web
from common import Report, parser, start
from torch import nn

import fxlora

sys.path.append(str(Path(__file__).parent.parent / "examples"))

R, ADAPTERS, CLIENTS = 8, 8, 64


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--library", nargs="*", default=["aiohttp"], help="also reported")
    options_parser.add_argument("--hidden", type=int, default=512)
    options_parser.add_argument("--layers", type=int, default=4)
    options_parser.add_argument("--requests", type=int, default=50, help="of each client")
    options = start(options_parser, rounds=5)
    if options.quick:
        options.hidden, options.layers, options.requests = 32, 2, 4
    report = Report(options)
    loras = adapters(options)
    folders = [tempfile.mkdtemp() for _ in loras]
    for lora, folder in zip(loras, folders, strict=True):
        fxlora.save_adapter(lora, folder)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, options))
    server.start()
    try:
        rows = asyncio.run(measure(ours.recv(), loras, folders, options))
    finally:
        server.terminate()
        server.join()
    title = (
        f"{CLIENTS} clients, {ADAPTERS} adapters: {options.layers} layers {options.hidden} x "
        f"{options.hidden}, r={R}"
    )
    report.add(title, rows, note="Medians over the rounds, with and without swaps in turns.")


def adapters(options: argparse.Namespace) -> list[fxlora.CapturedModule]:
    """Return adapted modules, the same in each process; one more than there are slots."""
    torch.manual_seed(0)
    size = options.hidden
    parts = [part for _ in range(options.layers) for part in (nn.Linear(size, size), nn.GELU())]
    gm = fxlora.capture(nn.Sequential(*parts), torch.randn(2, size)).eval()
    config = fxlora.LoraConfig(r=R, target_modules="all-linear", init_lora_weights=False)
    return [fxlora.inject(gm, fxlora.match(gm, config)) for _ in range(ADAPTERS + 1)]


# ---- the server ---------------------------------------------------------------------------------


def serve(connection: Connection, options: argparse.Namespace) -> None:
    """Serve the routed graph until the process is stopped; send the address first."""
    torch.set_num_threads(options.threads)
    asyncio.run(_serve(connection, fxlora.route(adapters(options)[:ADAPTERS])))


async def _serve(connection: Connection, routed: fxlora.CapturedModule) -> None:
    server = import_module("serve").Server(routed, {str(slot): slot for slot in range(ADAPTERS)})
    runner = web.AppRunner(server.app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    connection.send(f"http://127.0.0.1:{runner.addresses[0][1]}")
    await server.work()


# ---- the clients --------------------------------------------------------------------------------


async def measure(
    url: str, loras: list[fxlora.CapturedModule], folders: list[str], options: argparse.Namespace
) -> list[dict[str, str]]:
    x = torch.randn(options.hidden)
    with torch.no_grad():
        allowed = [[lora(x[None])[0]] for lora in loras[:ADAPTERS]]
        allowed[0].append(loras[-1](x[None])[0])  # slot 0 has two adapters in turns
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    async with ClientSession(url) as session:
        await load(session, x, allowed, folders, 2, swapping=False)  # to warm up
        for number in range(2 * options.rounds):
            swapping = bool(number % 2)
            result = await load(session, x, allowed, folders, options.requests, swapping)
            found[swapping].append(result)
    return [
        {"swaps": "under load" if swapping else "none"}
        | {name: f"{statistics.median(r[name] for r in results):.1f}" for name in results[0]}
        for swapping, results in found.items()
    ]


async def load(
    session: ClientSession,
    x: torch.Tensor,
    allowed: list[list[torch.Tensor]],
    folders: list[str],
    requests: int,
    swapping: bool,
) -> dict[str, float]:
    """Send the requests of all clients; return what was measured, in milliseconds."""
    taken: list[float] = []
    swaps: list[float] = []
    swapper = asyncio.create_task(swap(session, folders, swaps)) if swapping else None
    begin = time.perf_counter()
    await asyncio.gather(
        *(ask(session, x, n % ADAPTERS, allowed, requests, taken) for n in range(CLIENTS))
    )
    seconds = time.perf_counter() - begin
    if swapper is not None:
        swapper.cancel()
        await asyncio.gather(swapper, return_exceptions=True)
    assert len(taken) == CLIENTS * requests, "requests were lost"
    return {
        "requests/s": len(taken) / seconds,
        "median, ms": 1e3 * statistics.median(taken),
        "99th percentile, ms": 1e3 * statistics.quantiles(taken, n=100)[98],
        "swaps/s": len(swaps) / seconds,
    }


async def ask(
    session: ClientSession,
    x: torch.Tensor,
    slot: int,
    allowed: list[list[torch.Tensor]],
    requests: int,
    taken: list[float],
) -> None:
    body: dict[str, Any] = {"adapter": str(slot), "x": x.tolist()}
    for _ in range(requests):
        begin = time.perf_counter()
        async with session.post("/predict", json=body) as response:
            y = torch.tensor((await response.json())["y"])
        taken.append(time.perf_counter() - begin)
        assert any(torch.allclose(y, one, atol=1e-4) for one in allowed[slot]), "a wrong answer"


async def swap(session: ClientSession, folders: list[str], swaps: list[float]) -> None:
    while True:
        begin = time.perf_counter()
        body = {"folder": folders[-1] if len(swaps) % 2 == 0 else folders[0]}
        async with session.put("/adapters/0", json=body) as response:
            response.raise_for_status()
        swaps.append(time.perf_counter() - begin)
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    main()
