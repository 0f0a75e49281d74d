"""Rules say which weights are adapted, and how: by name, op, shape and kernel size."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule


class Network(nn.Module):
    """Classifies an image and the characters of its caption into 10 classes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 24)
        self.stem = nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3)
        self.blocks = nn.Sequential(
            nn.Conv2d(16, 40, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(40, 48, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(48, 56, kernel_size=3, padding=1),
        )
        self.mix = nn.Sequential(nn.Linear(80, 64), nn.ReLU(), nn.Linear(64, 72))
        self.head = nn.Linear(72, 10)

    def forward(self, image: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        seen = self.blocks(self.stem(image)).mean((2, 3))
        read = self.embed(caption).mean(1)
        return self.head(self.mix(torch.cat([seen, read], 1)))


# The first rule that matches a weight decides, so exceptions come first. All keys of a rule must
# match. A rule that decides no weight raises NoMatchError, so that a typo is not silent.
RULES = [
    Rule("stem", lora=None),  # do not adapt it
    Rule("head", train=True),  # train it in full, without LoRA
    Rule(op="conv*", kernel_size=1, lora=LoraConfig(r=2, lora_alpha=4)),
    Rule("blocks.*", op="conv2d", min_features=16, lora=LoraConfig(r=4, lora_alpha=8)),
    Rule(op="embedding", max_in_features=1000, lora=LoraConfig(r=3)),
    # PEFT's options inside a rule: all linear layers but one.
    Rule(op="linear", lora=LoraConfig(r=8, target_modules="all-linear", exclude_modules=["mix.2"])),
]


def main() -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 32, 32), torch.randint(96, (2, 12)))
    base = fxlora.capture(Network(), inputs)
    plan = fxlora.match(base, RULES)
    print(plan)
    show_first_match_wins(base)
    show_file(base, plan)


def show_first_match_wins(base: fxlora.CapturedModule) -> None:
    """If earlier rules take all weights that a rule matches, the error names those rules."""
    try:
        fxlora.match(base, [Rule(op="conv2d"), Rule("stem", lora=None)])
    except fxlora.NoMatchError as error:
        print(f"\nNoMatchError: {error}")


def show_file(base: fxlora.CapturedModule, plan: fxlora.Plan) -> None:
    """Show a plan as TOML, which is a rules file: it can be read, edited, and matched again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rules.toml")
        path.write_text(plan.to_toml(), encoding="utf-8")
        again = fxlora.match(base, path)
    rules = plan.to_toml().partition("[[site]]")[0]  # the sites follow; match finds them again
    print(f"\nplan.to_toml():\n\n{rules}")
    print(f"the plan read back from TOML is the same: {again == plan}")


if __name__ == "__main__":
    main()
