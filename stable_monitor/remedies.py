"""What to do about a verdict: for each stack what to type or write, and where docs/my_run_diverges.md says more.

The stack's name is in the records of runs that a stack's own wiring monitors; a loop of one's own is "".
"""

GUIDE = "docs/my_run_diverges.md#"
ROWS = {
    "collapse": "entropy-collapse",
    "vanishing": "vanishing-gradients",
    "blowup": "blow-up",
    "nan": "not-a-number",
    "unseen": "nothing-seen",
}
STACKS = {
    "fairseq": {
        "collapse": "--monitor-every 10 --monitor-alarm rescue, resumed from checkpoint_last.pt; anew: --reparam sigma",
        "vanishing": "--residual pre-ln, or --residual deepnorm",
        "blowup": "half of --lr, a longer --warmup-updates, --clip-norm 1.0",
        "nan": "--bf16 in place of --fp16, --clip-norm 1.0, half of --lr",
    },
    "transformers": {
        "collapse": 'MonitorCallback(every=10, on_alarm="rescue") and resume_from_checkpoint=True; '
        "anew: sigma_reparam(model)",
        "vanishing": 'residual="pre-ln", or residual="deepnorm", in the model\'s config',
        "blowup": "half of learning_rate, warmup_ratio=0.1, max_grad_norm=1.0",
        "nan": "bf16=True in place of fp16=True, max_grad_norm=1.0, half of learning_rate",
    },
    "lightning": {
        "collapse": 'MonitorCallback(every=10, on_alarm="rescue") and fit(ckpt_path=...); '
        "anew: sigma_reparam(self) at the end of the module's __init__",
        "vanishing": "pre-LN, or DeepNorm's scales (stable_core.deepnorm_scales)",
        "blowup": "half the learning rate, a longer warm-up, Trainer(gradient_clip_val=1.0)",
        "nan": 'precision="bf16-mixed" in place of "16-mixed", gradient_clip_val=1.0, half the learning rate',
    },
    "nanogpt": {
        "collapse": "--init_from=resume --monitor_every=10 --monitor_alarm=rescue; "
        "anew: --norm=layernorm --attention=dot --init=stock --reparam=sigma",
        "vanishing": "--residual=pre-ln, or --residual=deepnorm",
        "blowup": "half of --learning_rate, a longer --warmup_iters, --grad_clip=1.0",
        "nan": "--dtype=bfloat16 in place of float16, --grad_clip=1.0, half of --learning_rate",
    },
    "timm": {
        "collapse": "--monitor-every 10 --on-alarm rescue; anew: --model sigma_vit_..._preln",
        "vanishing": "a pre-LN model, as all of timm's ViTs are",
        "blowup": "half of --lr, more --warmup-epochs, --clip-grad 1.0",
        "nan": "bfloat16 or float32 in place of float16, gradients clipped to 1, half of --lr",
    },
    "": {
        "collapse": "Monitor(model, ..., on_alarm=Rescue(model, optimizer, lambda: model(batch))); "
        "anew: sigma_reparam(model)",
        "vanishing": "pre-LN, or DeepNorm's scales (stable_core.deepnorm_scales)",
        "blowup": "half the learning rate, a longer warm-up, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
        "nan": "bfloat16 or float32 in place of float16, gradients clipped to 1, half the learning rate",
    },
}
UNSEEN = "name the module that computes attention: docs/monitor.md says how"


ANEW = "; anew: "  # between what saves the run and what another one should take


def remedy(verdict: str, stack: str, rescues: int = 0) -> tuple[str, str]:
    """(what to do, where to read on); two empty strings for a healthy run.

    A stack that is not known counts as a loop of one's own. A run that was rescued is not told to rescue.
    """
    if verdict not in ROWS:
        return "", ""
    known = STACKS.get(stack, STACKS[""])
    what = UNSEEN if verdict == "unseen" else known[verdict]
    if rescues and ANEW in what:
        what = f"anew: {what.partition(ANEW)[2]}; or half the learning rate"
    return what, GUIDE + ROWS[verdict]
