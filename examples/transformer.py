"""GPT-2 with labels, an attention mask and sequences of any length; LoRA+ learning rates."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from transformers import GPT2Config, GPT2LMHeadModel

import fxlora

Batch = dict[str, torch.Tensor]


def main() -> None:
    torch.manual_seed(0)
    model = tiny_gpt2()
    batch = padded_batch(rows=6, length=10)
    batch_size, length = Dim("batch", min=2), Dim("length", min=2, max=32)
    shapes = {name: {0: batch_size, 1: length} for name in batch}

    base = fxlora.capture(model, kwargs=batch, dynamic_shapes=shapes)
    targets = ["c_attn", "c_proj", "wte", "lm_head"]  # the last two are tied: one delta for both
    config = fxlora.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    plan = fxlora.match(base, config)
    print(plan)

    lora = fxlora.inject(base, plan)
    train(lora)
    folded = fxlora.fold(lora)
    print(f"\n{fxlora.verify(lora, kwargs=batch, folded=folded)}")
    export(folded, batch, shapes)


def tiny_gpt2() -> GPT2LMHeadModel:
    """Return a GPT-2 of two layers with initial weights; lm_head is tied to the embedding wte."""
    sizes = {"vocab_size": 48, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    loss: dict[str, Any] = {"loss_type": "ForCausalLM"}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, **loss, use_cache=False))


def padded_batch(rows: int, length: int) -> Batch:
    """Return sequences that count up from a random token; the first row ends in padding."""
    tokens = (torch.randint(48, (rows, 1)) + torch.arange(length)) % 48
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    labels = tokens.masked_fill(mask == 0, -100)  # cross entropy ignores -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def train(lora: fxlora.CapturedModule) -> None:
    """Train with LoRA+ (Hayou et al. 2024), where B learns faster than A.

    Successive batches have different shapes.
    """
    groups = fxlora.lora_parameters(lora, groups=True, lr=2e-3, lr_ratio=8)
    optimizer = torch.optim.AdamW(groups)
    print("\nlearning rates:", {group["name"]: group["lr"] for group in groups})
    lora.train()
    for step in range(81):
        loss = lora(**padded_batch(rows=8 + step % 3, length=12 + step % 5)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


@torch.no_grad()
def export(folded: fxlora.CapturedModule, batch: Batch, shapes: dict[str, dict[int, Dim]]) -> None:
    """Export a .pt2 file, which accepts the same lengths and does not need fxlora."""
    other = padded_batch(rows=3, length=21)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gpt2.pt2")
        path = fxlora.export(folded, file, kwargs=batch, dynamic_shapes=shapes)
        program = torch.export.load(path).module()
    same = torch.equal(program(**other).logits, folded.eval()(**other).logits)
    print(f"\nthe .pt2 file on another length, 21: the same logits bit for bit: {same}")


if __name__ == "__main__":
    main()
