"""diffusers: teach mini a subject from a few photos, then draw it.

python examples/diffusers_subject.py [FOLDER]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nora_diffusion import NoraConfig, load_pipeline, save_adapter

sample = Path(__file__).parents[1] / "sample_data" / "subject"
photos = sorted(Path(sys.argv[1] if len(sys.argv) > 1 else sample).glob("*.jpg"))
images = np.stack([Image.open(photo).convert("RGB").resize((64, 64)) for photo in photos])

torch.manual_seed(0)
pipe = load_pipeline("mini")
pipe.unet.requires_grad_(False).add_adapter(NoraConfig(target_modules="attention"))
with torch.no_grad():
    pixels = torch.from_numpy(images).movedim(3, 1) / 127.5 - 1
    latents = pipe.vae.encode(pixels).latents * pipe.vae.config.scaling_factor
    words, _ = pipe.encode_prompt("a sks flower", "cpu", 1, do_classifier_free_guidance=False)
    words = words.expand(len(photos), -1, -1)

inner = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(inner, lr=2e-3)
for _ in range(60):
    noise, timesteps = torch.randn_like(latents), torch.randint(1000, (len(photos),))
    noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
    target = pipe.scheduler.get_velocity(latents, noise, timesteps)
    loss = (pipe.unet(noisy, timesteps, words).sample - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

pipe("a sks flower on the beach", generator=torch.manual_seed(0)).images[0].save("flower.png")
print(save_adapter(pipe, "flower.safetensors"), f"loss {loss.item():.3f}")
