"""Plain PEFT: a network that knows one curve learns another; save, load, merge.

python examples/peft_adapter.py
"""

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from nora_diffusion import NoraConfig

x = torch.linspace(-3, 3, 256)[:, None]


def fit(model: nn.Module, y: torch.Tensor, steps: int) -> float:
    """Train what is not frozen; returns the mean squared error."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return (model(x) - y).square().mean().item()


torch.manual_seed(0)
base = nn.Sequential(
    *(nn.Linear(1, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))
)
print(f"base on sin(2x): {fit(base, torch.sin(2 * x), 500):.4f}")

model = get_peft_model(base, NoraConfig(r=32, inner_r=8, target_modules=["2"]))
model.print_trainable_parameters()
print(f"base on cos(2x): {(model(x) - torch.cos(2 * x)).square().mean():.4f}")
print(f"adapted to cos(2x): {fit(model, torch.cos(2 * x), 500):.4f}")

model.save_pretrained("curve")
again = PeftModel.from_pretrained(model.unload(), "curve")
merged = again.merge_and_unload()
print(f"loaded and merged: {(merged(x) - torch.cos(2 * x)).square().mean():.4f}")
