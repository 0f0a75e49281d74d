"""Calculate what LoRA on a large model takes on 8 and on 64 GPUs: nothing is run.

P parameters of the base in L layers, a parameters of adapters (r on every linear layer of the
layers), T tokens on a GPU in a step, n GPUs, h the width. Bytes: bfloat16 base, float32 adapters,
gradients and AdamW's two moments.

    held         2P + 16a, divided by n where sharded (tensor parallel: half of a is copied)
    whole        FSDP2 at the root gathers 2P; per layer, this layer and the next: 2 · 2P/L
    activations  34·h·T a layer (Korthikanti et al. 2022, attention scores recomputed); with
                 checkpoints 2·h·T a layer, and one layer's
    sent         ring algorithms: a gather or scatter of b bytes sends (n-1)/n · b from each GPU,
                 an all-reduce twice that. DDP: an all-reduce of 4a. FSDP2: 2P gathered once (root)
                 or twice, 4a scattered. Tensor parallel: 4 all-reduces of 2·h·T a layer
    compute      2PT forward, 2PT for the gradients of activations, 6aT for A and B; with
                 checkpoints 2PT again

Seconds: compute at 40 % of the peak. FSDP2 and DDP send meanwhile, so that the longer of the two
counts; tensor parallelism waits, so that both count.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from common import table

GB = 1e9


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama family."""

    name: str
    layers: int
    width: int
    hidden: int  # of the MLP
    heads: int
    kv_heads: int
    words: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """The (in, out) of each linear layer of a layer."""
        kv = self.width // self.heads * self.kv_heads
        w, m = self.width, self.hidden
        return [(w, w), (w, kv), (w, kv), (w, w), (w, m), (w, m), (m, w)]

    @property
    def parameters(self) -> int:
        layer = sum(i * o for i, o in self.linears) + 2 * self.width
        return self.layers * layer + 2 * self.words * self.width + self.width

    def adapters(self, rank: int) -> int:
        return self.layers * sum(rank * (i + o) for i, o in self.linears)


LLAMA_70B = Model("a Llama of 70B", 80, 8192, 28672, 64, 8, 128256)
WRAPPERS = ("DDP", "FSDP2, root", "FSDP2, per layer", "FSDP2, per layer, checkpoints", "TP 8")


@dataclass(frozen=True)
class Setting:
    """The hardware and the batch."""

    gpus: int
    tokens: int  # on a GPU in a step; with tensor parallelism, on all 8
    peak: float  # FLOP/s in bfloat16
    inside: float  # bytes/s from a GPU to others of its node
    between: float  # bytes/s from a GPU to another node

    def bandwidth(self, gpus: int) -> float:
        return self.inside if gpus <= 8 else self.between


def row(model: Model, setting: Setting, wrapper: str, rank: int) -> dict[str, str]:
    p, a, n, t = model.parameters, model.adapters(rank), setting.gpus, setting.tokens
    layers, h = model.layers, model.width
    share = (n - 1) / n
    held, whole, sent = 2.0 * p + 16 * a, 0.0, 0.0
    layer_activations = 34.0 * h * t
    activations = layers * layer_activations
    flops = 4.0 * p * t + 6.0 * a * t
    if wrapper == "DDP":
        sent = 2 * share * 4 * a
    elif wrapper.startswith("FSDP2"):
        held /= n
        root = wrapper == "FSDP2, root"
        whole = 2.0 * p if root else 4.0 * p / layers
        sent = share * ((2.0 if root else 4.0) * p + 4 * a)
        if "checkpoints" in wrapper:
            activations = layers * 2.0 * h * t + layer_activations
            flops += 2.0 * p * t
    else:  # tensor parallel on 8, data parallel over the rest
        held = 2.0 * p / 8 + 16 * a * (0.5 + 0.5 / 8)
        activations /= 8
        flops /= 8
        sent = layers * 4 * 2 * (7 / 8) * 2.0 * h * t
    compute = flops / (0.4 * setting.peak)
    sending = sent / setting.bandwidth(8 if wrapper.startswith("TP") else n)
    seconds = compute + sending if wrapper.startswith("TP") else max(compute, sending)
    return {
        "GPUs": str(n),
        "wrapper": wrapper,
        "held, GB": f"{held / GB:.1f}",
        "whole, GB": f"{whole / GB:.1f}",
        "activations, GB": f"{activations / GB:.1f}",
        "in all, GB": f"{(held + whole + activations) / GB:.0f}",
        "sent, GB": f"{sent / GB:.1f}",
        "s a step": f"{seconds:.2f}",
        "tokens/s": f"{n * t / seconds / (8 if wrapper.startswith('TP') else 1):,.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens on a GPU in a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s in bfloat16 (an H100's)")
    parser.add_argument("--inside", type=float, default=450, help="GB/s inside a node")
    parser.add_argument("--between", type=float, default=50, help="GB/s of a GPU between nodes")
    options = parser.parse_args()
    model, a = LLAMA_70B, LLAMA_70B.adapters(options.rank)
    print(
        f"{model.name}: P = {model.parameters / 1e9:.1f}e9; r = {options.rank}, a = {a / 1e6:.0f}e6"
    )
    print(f"{options.tokens} tokens, {options.peak:g} TFLOP/s, {options.inside:g} and ", end="")
    print(f"{options.between:g} GB/s inside and between nodes\n")
    hardware = options.peak * 1e12, options.inside * GB, options.between * GB
    settings = [Setting(gpus, options.tokens, *hardware) for gpus in (8, 64)]
    rows = [row(model, each, name, options.rank) for each in settings for name in WRAPPERS]
    print(table(rows))
    print(f"\nA checkpoint (A, B and AdamW's moments): {12 * a / GB:.2f} GB; the base: ", end="")
    print(f"{2 * model.parameters / GB:.0f} GB")


if __name__ == "__main__":
    main()
