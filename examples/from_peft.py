"""A script written for PEFT, ported to fxlora: the import, and an example of the call.

    from peft import …                       from fxlora.peft import …
    model = get_peft_model(base, config)     model = get_peft_model(base, config, **batch)

The example batch is new, because fxlora captures the graph that runs on it. PEFT can read the
saved folder.
"""

import importlib.util
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fxlora.peft import LoraConfig, TaskType, get_peft_model


def main() -> None:
    torch.manual_seed(0)
    base, batch = tiny_llama(), copying_task()
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        modules_to_save=["lm_head"],
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
    )
    model = get_peft_model(base, config, **batch)
    model.print_trainable_parameters()

    train(model, batch)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        compare_with_peft(base, model, batch, folder)


def tiny_llama() -> LlamaForCausalLM:
    """Return a Llama of one layer with initial weights, so that nothing is downloaded."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


def copying_task() -> dict[str, Any]:
    """Return a batch to memorise: sequences whose second half repeats the first."""
    half = torch.randint(64, (16, 8))
    tokens = torch.cat([half, half], 1)
    return {"input_ids": tokens, "labels": tokens}


def train(model: torch.nn.Module, batch: dict[str, Any]) -> None:
    """Train with the same loop as a PEFT script."""
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for step in range(61):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


@torch.no_grad()
def compare_with_peft(
    base: LlamaForCausalLM, model: torch.nn.Module, batch: dict[str, Any], folder: str
) -> None:
    """Compare with PEFT, which loads the saved folder onto the same, unchanged base."""
    ours = model(**batch).logits
    if importlib.util.find_spec("peft") is None:
        print("peft is not installed: the folder is not compared with it")
        return
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(base.eval(), folder)(**batch).logits
    torch.testing.assert_close(theirs, ours)
    error = ((ours - theirs).abs().max() / ours.abs().max()).item()
    print(f"PEFT loads the folder: its logits differ from ours by {error:.1e} of the largest")


if __name__ == "__main__":
    main()
