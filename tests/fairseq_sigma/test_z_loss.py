"""z-loss in fairseq's criteria: by hand from a model's logits, and from the command line."""

import logging
import math

import pytest
import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY, adaptive_loss, cross_entropy
from fairseq.criterions import label_smoothed_cross_entropy as smoothed
from fairseq.logging import metrics

from . import test_language_model as lm
from . import test_transformer as mt
from .conftest import USER_DIR, call

PAD, END = 1, 2


def built(name: str, task, **settings):
    config = CRITERION_DATACLASS_REGISTRY[name](**settings)
    return CRITERION_REGISTRY[name].build_criterion(config, task)


def squares(logits: torch.Tensor) -> float:
    """Sum of log(Z)^2 of (positions, words)."""
    return sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist())


def translated() -> tuple:
    """A model in training mode without dropout, two sentences of four and three words, and its logits."""
    model = mt.build("preln_transformer_18l", encoder_layers=1, decoder_layers=1).train()
    target = torch.tensor([[7, 6, 5, END], [9, 8, END, PAD]])
    sample = {"net_input": mt.sentence(), "target": target, "ntokens": 7}
    return model, sample, model(**sample["net_input"])[0].detach()


@pytest.mark.parametrize(
    "name, stock, settings, first",
    [
        ("cross_entropy", cross_entropy.CrossEntropyCriterion, {}, 0),
        ("label_smoothed_cross_entropy", smoothed.LabelSmoothedCrossEntropyCriterion, {"label_smoothing": 0.1}, 0),
        (
            "label_smoothed_cross_entropy",
            smoothed.LabelSmoothedCrossEntropyCriterion,
            {"label_smoothing": 0.1, "ignore_prefix_size": 1, "report_accuracy": True},
            1,
        ),
    ],
)
def test_words_that_count_have_it_in_training(name, stock, settings, first):
    model, sample, logits = translated()
    plain = stock(mt.Task, False, **settings)(model, sample)
    criterion = built(name, mt.Task, sentence_avg=False, z_loss=0.01, **settings)
    loss, size, logged = criterion(model, sample)
    expected = 0.01 * squares(torch.cat([logits[0, first:], logits[1, first:3]]))
    assert loss.item() == pytest.approx(plain[0].item() + expected) and size == 7
    assert logged.pop("z_loss").item() == pytest.approx(expected)
    assert logged == plain[2]
    assert not model._forward_hooks
    for without in (
        criterion(model.eval(), sample),
        built(name, mt.Task, sentence_avg=False, **settings)(model.train(), sample),
    ):
        assert without[0].item() == plain[0].item() and without[2] == plain[2]
    with metrics.aggregate() as seen:
        type(criterion).reduce_metrics(
            [{**plain[2], "z_loss": torch.tensor(0.5)}, {**plain[2], "z_loss": torch.tensor(0.9)}]
        )
    assert seen["z_loss"].avg == pytest.approx(1.4 / 14)


def test_of_an_adaptive_softmax_each_that_a_word_passes():
    model, sample = lm.build("preln_transformer_lm_wiki103").train(), lm.sample()
    sample["target"][0, -2:] = PAD
    config = {"sentence_avg": False, "ddp_backend": "legacy_ddp"}
    plain = adaptive_loss.AdaptiveLoss(lm.TASK, False)(model, sample)
    loss, _, logged = built("adaptive_loss", lm.TASK, z_loss=0.01, **config)(model, sample)
    softmax, target = model.decoder.adaptive_softmax, sample["target"].flatten()
    x = model(**sample["net_input"])[0].detach().flatten(0, 1)
    expected = squares(softmax.head(x[target != PAD]))
    for (start, end), band in zip([(10, 16), (16, 24)], softmax.tail, strict=True):
        inside = (target >= start) & (target < end)
        assert inside.any()
        expected += squares(band(x[inside]))
    assert loss.item() == pytest.approx(plain[0].item() + 0.01 * expected)
    assert logged["z_loss"].item() == pytest.approx(0.01 * expected)
    assert logged["loss"].item() == pytest.approx(plain[0].item())


def test_a_criterion_of_all_words_refuses_an_adaptive_softmax():
    model = lm.build("preln_transformer_lm_wiki103").train()
    with pytest.raises(
        ValueError, match=r"--z-loss 0.1: this model's softmax is adaptive: allowed is --criterion adaptive"
    ):
        built("cross_entropy", lm.TASK, sentence_avg=False, z_loss=0.1)(model, lm.sample())


def test_wrong_values_are_named(train):
    with pytest.raises(ValueError, match=r"--z-loss = -1.0: allowed are finite numbers from 0"):
        train("wrong", "sigma_transformer_18l", 1, "--z-loss", "-1")
    with pytest.raises(ValueError, match=r"--z-loss 0.1: --criterion ctc has a softmax for each frame"):
        built("ctc", lm.TASK, z_loss=0.1)


def test_the_flag_changes_the_update_and_is_off_at_0(train, tmp_path, corpus, caplog):
    caplog.set_level(logging.INFO)
    without = train("without", "sigma_transformer_18l", 2)["model"]
    off = train("off", "sigma_transformer_18l", 2, "--z-loss", "0")["model"]
    on = train("on", "sigma_transformer_18l", 2, "--z-loss", "0.1")
    name = "decoder.embed_tokens.weight"
    assert torch.equal(without[name], off[name]) and not torch.allclose(without[name], on["model"][name], atol=1e-4)
    assert on["cfg"]["criterion"]["z_loss"] == 0.1 and "| z_loss " in caplog.text
    path = ("--path", tmp_path / "on" / "checkpoint_last.pt", "--user-dir", USER_DIR, "--cpu")
    call("validate", corpus, *path, "--task", "translation", "--valid-subset", "test", "--batch-size", 20)
