# %% [markdown]
# # σReparam in any Hugging Face model, with Trainer
# A small Llama, from its config as no download is needed; yours is `AutoModelForCausalLM.from_pretrained(...)`. One call puts
# σReparam on, a callback looks on, and saving, resuming and loading are transformers' own.
# `pip install 'stable-transformer[hf]'`; half a minute on a laptop.

# %%
import logging
from pydoc_data.topics import topics  # English text that comes with Python

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import hf_stable
from stable_core import sigma_layers

torch.set_num_threads(1)
torch.manual_seed(1)
logging.getLogger("stable_monitor").setLevel(logging.ERROR)
text = torch.tensor([min(ord(letter), 127) for letter in "".join(topics.values())])


class Blocks(Dataset):
    def __len__(self) -> int:
        return len(text) // 128

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = text[128 * i : 128 * (i + 1)]
        return {"input_ids": ids, "labels": ids}


sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=128, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, **sizes)
model = AutoModelForCausalLM.from_config(config)
hf_stable.sigma_reparam(model)  # the same function as before
print(len(list(sigma_layers(model))), "layers have σReparam")

# %% [markdown]
# Trainer as ever; with `UndecayedGamma` it leaves gamma without weight decay.

# %%
arguments = TrainingArguments(
    "runs/notebook/llama", learning_rate=3e-3, max_steps=60, per_device_train_batch_size=8, weight_decay=0.1,
    logging_steps=20, save_steps=60, report_to="none", use_cpu=True, disable_tqdm=True,
)  # fmt: skip


class MyTrainer(hf_stable.UndecayedGamma, Trainer):
    pass


monitor = hf_stable.MonitorCallback(every=10)
trainer = MyTrainer(model, arguments, train_dataset=Blocks(), callbacks=[monitor])
trainer.train()

# %% [markdown]
# The saved folder loads with gamma and u, bit for bit; folded, it needs transformers alone.

# %%
model.eval().save_pretrained("runs/notebook/sigma-llama")
again = AutoModelForCausalLM.from_pretrained("runs/notebook/sigma-llama").eval()
ids = text[None, :64]
with torch.no_grad():
    print("bit for bit:", torch.equal(again(ids).logits, model(ids).logits))
    plain = hf_stable.fold(again)
    print("folded, largest difference:", (plain(ids).logits - model(ids).logits).abs().max().item())
plain.save_pretrained("runs/notebook/plain-llama")
