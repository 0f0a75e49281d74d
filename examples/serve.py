"""Serve many adapters over HTTP from one routed graph, and swap them while clients ask.

    POST /predict     {"adapter": "a", "x": [...]}    the output for x under the adapter
    PUT /adapters/a   {"folder": "..."}               put the adapter of a folder in its place

Waiting requests become one batch, whatever their adapters are. It needs aiohttp.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import torch
from aiohttp import ClientSession, web

import fxlora

CLIENTS, REQUESTS, SWAPS, MOST = 64, 5, 4, 32


class Server:
    def __init__(self, routed: fxlora.CapturedModule, slots: dict[str, int]) -> None:
        self.routed, self.slots = routed.eval(), slots
        self.base = fxlora.remove(routed)
        self.waiting: asyncio.Queue[tuple[list[float], int, asyncio.Future[list[float]]]]
        self.waiting = asyncio.Queue()
        self.free = asyncio.Lock()  # a swap writes between two batches, never in one
        self.app = web.Application()
        self.app.add_routes(
            [web.post("/predict", self.predict), web.put("/adapters/{name}", self.swap)]
        )

    async def predict(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if asked["adapter"] not in self.slots:
            raise web.HTTPNotFound(text=f"adapters: {', '.join(self.slots)}")
        answer = asyncio.get_running_loop().create_future()
        await self.waiting.put((asked["x"], self.slots[asked["adapter"]], answer))
        return web.json_response({"y": await answer})

    async def swap(self, request: web.Request) -> web.Response:
        slot, folder = self.slots[request.match_info["name"]], (await request.json())["folder"]
        try:  # the batches go on while the files are read
            adapter = await asyncio.to_thread(fxlora.load_adapter, self.base, folder)
            async with self.free:
                await asyncio.to_thread(fxlora.swap_adapter, self.routed, slot, adapter)
        except fxlora.AdapterError as error:  # nothing was written
            raise web.HTTPConflict(text=str(error)) from error
        return web.Response()

    async def work(self) -> None:
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < MOST and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            inputs, slots, answers = zip(*batch, strict=True)
            try:
                async with self.free:
                    outputs = await asyncio.to_thread(self.run, inputs, slots)
                for answer, output in zip(answers, outputs, strict=True):
                    answer.set_result(output)
            except Exception as error:  # noqa: BLE001 - each client of the batch is told
                for answer in answers:
                    answer.set_exception(error)

    @torch.inference_mode()
    def run(self, inputs: tuple[list[float], ...], slots: tuple[int, ...]) -> list[list[float]]:
        return self.routed(torch.tensor(inputs), adapter_ids=torch.tensor(slots)).tolist()


async def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    gm = fxlora.capture(model, torch.randn(2, 8)).eval()
    config = fxlora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    loras = [fxlora.inject(gm, fxlora.match(gm, config)) for _ in range(3)]
    folders = [Path(tempfile.mkdtemp()) for _ in loras]
    for lora, folder in zip(loras, folders, strict=True):
        fxlora.save_adapter(lora, folder)
    server = Server(fxlora.route(loras[:2]), {"a": 0, "b": 1})
    worker = asyncio.create_task(server.work())
    runner = web.AppRunner(server.app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with ClientSession(url) as session:
        right = asyncio.gather(*(ask(session, number, loras) for number in range(CLIENTS)))
        for number in range(SWAPS):  # b is loras[2] and loras[1] in turn
            other = {"folder": str(folders[2 - number % 2])}
            async with session.put("/adapters/b", json=other) as response:
                response.raise_for_status()
        print(f"{sum(await right)} of {CLIENTS * REQUESTS} answers right, {SWAPS} swaps")
    worker.cancel()
    await runner.cleanup()


async def ask(session: ClientSession, number: int, loras: list[fxlora.CapturedModule]) -> int:
    """Ask as one client; return how many answers are those of an adapter that was there."""
    name, allowed = ("a", loras[:1]) if number % 2 else ("b", loras[1:])
    right = 0
    for _ in range(REQUESTS):
        x = torch.randn(8)
        async with session.post("/predict", json={"adapter": name, "x": x.tolist()}) as response:
            y = torch.tensor((await response.json())["y"])
        right += any(torch.allclose(y, lora(x[None])[0], atol=1e-5) for lora in allowed)
    return right


if __name__ == "__main__":
    asyncio.run(main())
