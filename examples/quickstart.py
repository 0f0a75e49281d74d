"""The shortest complete use: capture, match, inject, train, verify, fold."""

import torch
from torch import nn

import fxlora

torch.manual_seed(0)
# nn.MultiheadAttention reads its packed in_proj_weight without calling any nn.Linear.
model = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=48, dropout=0.0, batch_first=True)
inputs, goal = torch.randn(8, 10, 32), torch.randn(8, 10, 32)

base = fxlora.capture(model, inputs)
plan = fxlora.match(base, fxlora.LoraConfig(r=4, target_modules=["self_attn", "out_proj"]))
print(plan, end="\n\n")

lora = fxlora.inject(base, plan).train()
optimizer = torch.optim.AdamW(fxlora.lora_parameters(lora), lr=1e-2)
for step in range(41):
    loss = nn.functional.mse_loss(lora(inputs), goal)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

print(f"\n{fxlora.report(lora)}\n")
folded = fxlora.fold(lora)
print(fxlora.verify(lora, inputs, folded=folded))
