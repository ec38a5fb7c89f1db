"""z-loss in any model's own loss: by hand from its logits, under accumulation, and in no evaluation."""

import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_stable import SigmaTransformerConfig, SigmaTransformerForConditionalGeneration, add_z_loss

from .models import stable_gpt, tokens
from .test_combinations import MODELS

SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
LABELS = tokens(2, 9, seed=1).index_put((torch.tensor([0, 1]), torch.tensor([3, 8])), torch.tensor(-100))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=16, **dropout))


def translation() -> SigmaTransformerForConditionalGeneration:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return SigmaTransformerForConditionalGeneration(SigmaTransformerConfig(vocab_size=99, **sizes, **heads))


def modern_bert() -> ModernBertForMaskedLM:
    try:
        return ModernBertForMaskedLM(ModernBertConfig(**SMALL, pad_token_id=0))
    except StrictDataclassError as e:  # transformers 5.10 refuses the rope settings that it puts there itself
        pytest.skip(f"this transformers cannot make a ModernBertConfig: {e}")


def by_hand(logits: torch.Tensor, counts: torch.Tensor) -> float:
    rows = [row for row, kept in zip(logits.flatten(0, -2).tolist(), counts.flatten().tolist(), strict=True) if kept]
    return sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(rows)


@pytest.mark.parametrize(
    "make, shifts",
    [
        (gpt2, True),
        (stable_gpt, True),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), True),
        (modern_bert, False),
        (translation, False),
    ],
)
def test_the_loss_of_tokens_has_it_where_gradients_are(make, shifts):
    model = make().eval()
    inputs = {"input_ids": tokens(2, 9), "labels": LABELS}
    plain = model(**inputs)
    assert add_z_loss(model, 0.01) is model
    counts = LABELS != -100
    last = torch.zeros(2, 1, dtype=torch.bool)
    counts = torch.cat([counts[:, 1:], last], 1) if shifts else counts
    expected = plain.loss.item() + 0.01 * by_hand(plain.logits, counts)
    assert model(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)
    assert copy.deepcopy(model)(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        assert model(**inputs).loss.item() == plain.loss.item()


def test_a_compiled_model_has_it_in_one_graph():
    model, inputs = add_z_loss(gpt2(), 0.01), {"input_ids": tokens(2, 9), "labels": LABELS}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize("kind", MODELS)
def test_the_setting_of_this_plugins_models_is_saved(kind, tmp_path):
    cls, config, batch = MODELS[kind]
    config = type(config)(**{**config.to_dict(), "z_loss": 0.01})
    torch.manual_seed(0)
    model = cls(config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        plain = model(**batch)
    counts = torch.ones_like(batch["labels"], dtype=torch.bool)
    if kind == "gpt":  # which predicts the next token
        counts[:, -1] = False
    expected = plain.loss.item() + 0.01 * by_hand(plain.logits, counts)
    for each in (model, cls.from_pretrained(tmp_path)):
        assert each(**batch).loss.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"z_loss = -1\.0: allowed are finite numbers from 0"):
        cls.from_pretrained(tmp_path, z_loss=-1.0)


def test_the_loss_of_classes():
    config = ViTConfig(**{**SMALL, "image_size": 8, "patch_size": 4, "num_labels": 5})
    inputs = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 4, 2])}
    model = ViTForImageClassification(config).eval()
    plain = model(**inputs)
    every = torch.ones(3, dtype=torch.bool)
    expected = plain.loss.item() + 0.01 * by_hand(plain.logits, every)
    assert add_z_loss(model, 0.01)(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="problem_type = 'multi_label_classification' has no softmax: no z-loss"):
        model(inputs["pixel_values"], torch.ones(3, 5))


def test_the_loss_of_a_class_for_each_sequence():
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3, pad_token_id=0)).eval()
    inputs = {"input_ids": tokens(2, 9), "labels": torch.tensor([2, 0])}
    plain = model(**inputs)
    expected = plain.loss.item() + 0.01 * by_hand(plain.logits, torch.ones(2, dtype=torch.bool))
    assert add_z_loss(model, 0.01)(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_class_for_each_token():
    model = LlamaForTokenClassification(LlamaConfig(**SMALL, num_labels=3)).eval()
    inputs = {"input_ids": tokens(2, 9), "labels": torch.where(LABELS == -100, -100, LABELS % 3)}
    plain = model(**inputs)
    expected = plain.loss.item() + 0.01 * by_hand(plain.logits, LABELS != -100)
    assert add_z_loss(model, 0.01)(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)


def trained(batch_size: int, accumulation: int, folder, coefficient: float) -> tuple[dict, dict]:
    """Weights after one update of four sequences, and the metrics of an evaluation."""
    data = [{"input_ids": row, "labels": row.clone()} for row in tokens(4, 9)]
    for i, item in enumerate(data):
        item["labels"][: 2 * i] = -100  # of another length each
    model = gpt2()
    if coefficient:
        add_z_loss(model, coefficient)
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1,
        optim="sgd", learning_rate=0.1, max_grad_norm=0, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()
    trainer.train()
    return {name: value.clone() for name, value in model.state_dict().items()}, before


def test_under_trainer_accumulated_is_the_whole_batch(tmp_path):
    whole, metrics = trained(4, 1, tmp_path, 1.0)
    parts, _ = trained(1, 4, tmp_path, 1.0)
    without, plain = trained(4, 1, tmp_path, 0.0)
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name])
    assert not torch.allclose(whole["lm_head.weight"], without["lm_head.weight"], atol=1e-4)
    assert metrics["eval_loss"] == plain["eval_loss"]


@pytest.mark.parametrize(
    "make, coefficient, message",
    [
        (gpt2, -1.0, "coefficient = -1.0: allowed are finite numbers from 0"),
        (lambda: add_z_loss(gpt2()), 1e-4, "GPT2LMHeadModel: it has z-loss already, with coefficient = 0.0001"),
        (
            lambda: T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=8, vocab_size=9)),
            1e-4,
            "compute_loss",
        ),
        (
            lambda: BertForMaskedLM(BertConfig(**SMALL)),
            1e-4,
            "BertForMaskedLM: its forward does not call self.loss_func",
        ),
        (
            lambda: LlamaForQuestionAnswering(LlamaConfig(**SMALL)),
            1e-4,
            "LlamaForQuestionAnswering: loss_function = .*ForQuestionAnsweringLoss.*: allowed are ForCausalLM, ForMaskedLM",
        ),
        (lambda: torch.nn.Linear(2, 2), 1e-4, "Linear: its forward does not call"),
    ],
)
def test_what_it_cannot_be_added_to_says_so(make, coefficient, message):
    with pytest.raises(ValueError, match=message):
        add_z_loss(make(), coefficient)
