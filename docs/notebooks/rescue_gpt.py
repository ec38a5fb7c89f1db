# %% [markdown]
# # Rescue a collapsing GPT
# A small GPT-2 at a learning rate that is too high: its attention entropy collapses. The same run again, with a remedy given to
# its monitor, is rescued when the alarm rings. `pip install 'stable-transformer[hf]'`; a minute on a laptop.

# %%
import logging
import shutil
from pathlib import Path
from pydoc_data.topics import topics  # English text that comes with Python

import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from stable_monitor import Monitor, Rescue
from stable_monitor.diagnose import diagnose
from stable_monitor.records import load

logging.getLogger("stable_monitor").setLevel(logging.ERROR)  # it says each alarm and rescue; the plot below shows them
torch.set_num_threads(1)
text = torch.tensor([min(ord(letter), 127) for letter in "".join(topics.values())])
UPDATES, EVERY = 200, 10

# %% [markdown]
# The training loop is an ordinary one. What is ours: the monitor is constructed and told of each update, and
# `on_alarm=Rescue(...)` gets a way to run the model on a batch.


# %%
def batch(generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(text) - 128, (8, 1), generator=generator)
    return text[starts + torch.arange(128)]


def train(path: str, rescued: bool) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 128, "n_positions": 128, "n_embd": 96, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.016, weight_decay=0.1)
    generator, probe = torch.Generator().manual_seed(1), batch(torch.Generator().manual_seed(2))
    remedy = {"on_alarm": Rescue(model, optimizer, lambda: model(probe))} if rescued else {}
    monitor = Monitor(model, every=EVERY, optimizer=optimizer, path=path, **remedy)
    for _ in range(UPDATES):
        ids = batch(generator)
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        monitor.step(loss)  # before the gradients are cleared
        optimizer.zero_grad()
    monitor.close()


for path, rescued in (("runs/notebook/alone", False), ("runs/notebook/rescued", True)):
    shutil.rmtree(path, ignore_errors=True)
    train(path, rescued)

# %% [markdown]
# What became of them, and the loss and the entropy of the layer that attends to least.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for name in ("alone", "rescued"):
    records, _ = load(f"runs/notebook/{name}")
    steps = [record["step"] for record in records]
    left.plot(steps, [record["loss"] for record in records], label=name)
    right.plot(steps, [min(min(layer["entropy"]) for layer in record["layers"].values()) for record in records])
    verdict, _ = diagnose(Path("runs/notebook") / name)
    print(f"{name}: last loss {records[-1]['loss']:.2f}. {verdict}")
left.set(xlabel="update", title="training loss, nats")
right.set(xlabel="update", title="least attention entropy, nats")
left.legend()
plt.show()

# %% [markdown]
# A rescued model trains on, saves, loads and resumes as it is; `stable_core.fold(model)` makes plain layers of it. Which stack
# has which switch: [my run diverges](../my_run_diverges.md#a-run-under-way).
