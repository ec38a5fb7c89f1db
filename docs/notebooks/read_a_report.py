# %% [markdown]
# # Read a report
# What the monitor writes, and what of it to look at first: two runs of a small encoder, at a rate that suits it and at a
# hundred times that. `pip install 'stable-transformer[monitor]'`; half a minute on a laptop.

# %%
import logging
import math
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from stable_monitor import Monitor
from stable_monitor.diagnose import diagnose
from stable_monitor.records import load
from stable_monitor.report import report

logging.getLogger("stable_monitor").setLevel(logging.ERROR)
torch.set_num_threads(1)


class Encoder(nn.Module):
    """Sorts: the n-th output is the n-th smallest of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(64, 64), nn.Parameter(0.02 * torch.randn(32, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(64, 64)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(numbers) + self.position))


def train(lr: float, path: Path) -> None:
    torch.manual_seed(1)
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    monitor = Monitor(model, every=10, optimizer=optimizer, path=path)
    for _ in range(200):
        numbers = torch.randint(64, (32, 32))
        loss = nn.functional.cross_entropy(model(numbers).flatten(0, 1), numbers.sort().values.flatten())
        loss.backward()
        optimizer.step()
        monitor.step(loss)  # before the gradients are cleared
        optimizer.zero_grad()
    monitor.close()


runs = {Path("runs/notebook/lr-0.001"): 0.001, Path("runs/notebook/lr-0.1"): 0.1}
for path, lr in runs.items():
    shutil.rmtree(path, ignore_errors=True)
    train(lr, path)

# %% [markdown]
# **First the verdict.** It names what became of the run, the layer, and since when; the second line is a remedy.

# %%
for path in runs:
    verdict, (remedy, guide) = diagnose(path)
    print(f"{path.name}: {verdict}\n  {remedy or 'nothing to do'}")

# %% [markdown]
# **Then the page**, both runs side by side: `stable report RUN RUN -o report.html` writes the same. Losses are on top; below
# them for each layer entropy, the largest logit, spectral norms and gradients.

# %%
report(list(runs), Path("runs/notebook/report.html"))

# %% [markdown]
# **The numbers themselves.** A record is a dictionary: `step`, `loss`, and for each layer its heads' entropy in nats and
# largest logit. Entropy near log(keys) attends to all alike, near 0 to one. A collapse is both at once: entropy falls to
# nothing in a layer while its logits go to hundreds.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for axis, path in zip(axes, runs, strict=True):
    records, _ = load(path)
    steps = [record["step"] for record in records]
    for name in records[0]["layers"]:
        entropy = [sum(r["layers"][name]["entropy"]) / len(r["layers"][name]["entropy"]) for r in records]
        axis.plot(steps, entropy, label=name)
    axis.axhline(math.log(32), color="0.6", linestyle=":")
    axis.set(title=f"{path.name}: entropy, nats", xlabel="update", ylim=(0, None))
axes[0].legend(fontsize=7)
plt.show()
