# %% [markdown]
# # Fine-tune a timm ViT with σReparam, and fold it
# A trained ViT gets σReparam without changing what it computes, trains on, and becomes plain layers again, which need timm
# alone. Here it is trained on the digits 0 to 4 first, and fine-tuned on 5 to 9; yours is
# `timm.create_model(..., pretrained=True)`.
# `pip install 'stable-transformer[timm]' scikit-learn`; half a minute on a laptop.

# %%
import copy

import timm
import torch
from sklearn.datasets import load_digits

from stable_core import fold, param_groups, sigma_reparam
from stable_monitor import verify

torch.set_num_threads(1)
torch.manual_seed(1)
digits = load_digits()
images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32).unsqueeze(1)
labels = torch.tensor(digits.target)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, of: torch.Tensor, updates: int) -> float:
    """Accuracy on the last 100 images of those classes."""
    chosen = of.nonzero().flatten()
    chosen, held_out = chosen[:-100], chosen[-100:]
    model.train()
    for _ in range(updates):
        picked = chosen[torch.randint(len(chosen), (64,))]
        torch.nn.functional.cross_entropy(model(images[picked]), labels[picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()


sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10}
model = timm.create_model("vit_small_patch16_224", **sizes)
accuracy = train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), labels < 5, 200)
print(f"digits 0 to 4: {accuracy:.0%}")

# %% [markdown]
# gamma starts at each weight's own spectral norm: the outputs are the same to the last digits.
# `param_groups` leaves gamma and other vectors without weight decay.

# %%
plain = copy.deepcopy(model)
sigma_reparam(model)
with torch.no_grad():
    print("largest difference of the outputs:", (model(images[:100]) - plain(images[:100])).abs().max().item())
accuracy = train(model, torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.05)), labels >= 5, 200)
print(f"digits 5 to 9: {accuracy:.0%}")

# %% [markdown]
# Does it act? `verify` looks at each attention and each weight in a forward pass.

# %%
print(verify(model, lambda: model(images[:8])))

# %% [markdown]
# Folded, the state dict has stock timm's names, and a stock model takes it.

# %%
with torch.no_grad():
    before = model(images[:100])
    fold(model)
    stock = timm.create_model("vit_small_patch16_224", **sizes).eval()
    stock.load_state_dict(model.state_dict())
    print("largest difference of the outputs:", (stock(images[:100]) - before).abs().max().item())
