"""Mends of fairseq itself: faults that nobody repairs upstream any more and that every user meets.

fairseq imports the user dir before it parses the full command line, so what is replaced here is in
place when arguments are parsed, processes spawned, data batched and checkpoints read. A process
that fairseq spawns imports the user dir again, at the latest first thing in ``main``. Out of reach: what
fairseq-hydra-train does before ``main``, because it imports the user dir only there.

Each mend looks for its fault first, and leaves alone a fairseq that does not show it.
"""

import argparse
import atexit
import collections
import functools
import importlib.util
import inspect
import logging
import os
import sys
import tempfile
import types
import typing

import numpy as np
import omegaconf
import torch
from fairseq import options, utils
from fairseq.data import Dictionary, data_utils, language_pair_dataset, token_block_dataset
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import progress_bar
from fairseq.models import distributed_fairseq_model
from fairseq.modules import dynamic_crf_layer
from fairseq.optim import FP16Optimizer


@functools.cache
def apply():
    """Applies every mend to this process, the first time it is called."""
    allow_checkpoint_classes()
    keep_every_sample()
    names_that_numpy_dropped()
    spawn_on_cpu()
    wrap_cpu_models()
    gather_on_cpu()
    bf16_without_tpu()
    fp16_on_cpu()
    sacrebleu_scores()
    refuse_to_train_nothing()
    help_of_the_arch()
    log_lines_once()


def _source_has(function, text):
    return text in inspect.getsource(function)


def allow_checkpoint_classes():
    """Lets ``torch.load`` read fairseq's checkpoints with its safety on.

    Since torch 2.6 ``torch.load`` refuses every class it was not told of (``weights_only=True``),
    and fairseq's checkpoints hold some: resume, fairseq-generate and the broadcast of a checkpoint
    to the other ranks end in an UnpicklingError. These are the classes they hold, and no others.
    """
    arrays = [function.__reduce__()[0] for function in (np.zeros(0), np.float64(0))]
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,  # the model's arguments
            Dictionary,  # the state of speech and fine-tuning tasks
            # Meters: --eval-bleu logs arrays of counts, sentence classification scalars. numpy 2
            # moved what rebuilds them, and a checkpoint knows it by its writer's name.
            np.ndarray,
            np.dtype,
            *(type(np.dtype(kind)) for kind in (np.int64, np.float32, np.float64)),
            *((f, f"numpy.{core}.multiarray.{f.__name__}") for f in arrays for core in ("core", "_core")),
            # Rank 0 broadcasts the checkpoint it has read: tensors apart, the config as a DictConfig.
            distributed_utils._TensorPlaceholder,
            omegaconf.DictConfig,
            omegaconf.ListConfig,
            omegaconf.AnyNode,
            omegaconf.base.Metadata,
            omegaconf.base.ContainerMetadata,
            collections.defaultdict,
            typing.Any,
            dict,
            list,
            int,
        ]
    )


def keep_every_sample():
    """Gives back the samples that ``batch_by_size`` throws away.

    It deletes its last batch unless that is a multiple of ``--required-batch-size-multiple``, 8 by
    default: fairseq-generate translates 40 of 43 sentences, training and validation miss theirs
    too, and fewer than 8 samples are "an empty dataset". The option itself allows such a batch: it
    asks for batches "less than N or a multiple of N".
    """
    original = data_utils.batch_by_size

    def count(batches):
        return sum(len(batch) for batch in batches)

    if count(original(np.arange(11), lambda index: 1, required_batch_size_multiple=8)) == 11:
        return

    @functools.wraps(original)
    def batch_by_size(indices, *args, **kwargs):
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter(indices, dtype=np.int64, count=-1)
        if len(indices) == 0:
            return []  # the original looks at its last batch, and there is none
        batches = original(indices, *args, **kwargs)
        # Batches are consecutive slices of indices: what is missing is the slice at the end, which
        # was a batch within max_tokens and max_sentences before it was deleted.
        rest = indices[count(batches) :]
        return [*batches, rest] if len(rest) else batches

    data_utils.batch_by_size = batch_by_size


def names_that_numpy_dropped():
    """Gives the modules of fairseq that ask numpy for names of its past a numpy that still has them.

    ``np.compat`` and ``np.int`` are gone, and ``percentile`` calls its ``interpolation`` ``method``: ``--sample-break-mode
    eos``, ``--num-batch-buckets`` and masks without overlap end in an error. numpy itself stays as it is: other libraries
    look at what it has to tell its version.
    """
    for module in (token_block_dataset, language_pair_dataset, data_utils, dynamic_crf_layer):
        if module.np is np:
            module.np = _OldNumpy("numpy")


class _OldNumpy(types.ModuleType):
    """numpy, and what fairseq uses of an older one."""

    compat = types.SimpleNamespace(long=int)
    int, float = int, float

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def percentile(values, percents, interpolation):
        return np.percentile(values, percents, method=interpolation)


def spawn_on_cpu():
    """Makes ``--cpu --distributed-world-size N`` train in N processes.

    fairseq spawns one process per GPU. Without one, ``--distributed-world-size 2`` alone ends in an
    AssertionError, and with ``--distributed-init-method`` nothing is spawned: fairseq-train exits 0
    and has not trained.
    """
    original = distributed_utils.call_main
    if not _source_has(original, "torch.cuda.device_count()"):
        return

    @functools.wraps(original)
    def call_main(cfg, main, **kwargs):
        group = cfg.distributed_training
        on_cpu = cfg.common.cpu or not torch.cuda.is_available()
        if not on_cpu or cfg.common.tpu or group.distributed_world_size == 1:
            return original(cfg, main, **kwargs)
        if group.distributed_backend == "nccl":  # the default, which knows GPUs only
            group.distributed_backend = "gloo"
        if group.distributed_no_spawn:
            return original(cfg, main, **kwargs)
        if group.distributed_rank or "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise ValueError(
                "On CPU one command spawns every process (no --distributed-rank, no torchrun or srun), or each "
                "rank R is started with --distributed-no-spawn --distributed-rank R --distributed-world-size "
                f"{group.distributed_world_size} --distributed-backend gloo --distributed-init-method tcp://HOST:PORT"
            )
        group.distributed_rank = None  # distributed_main then counts the ranks from 0
        given, port = group.distributed_init_method, group.distributed_port
        with tempfile.TemporaryDirectory() as folder:  # they meet there: a port that is free may be taken by then
            here = f"tcp://127.0.0.1:{port}" if port > 0 else f"file://{folder}/rendezvous"
            group.distributed_init_method = given or here
            try:
                torch.multiprocessing.spawn(_rank, args=(main, cfg, kwargs), nprocs=group.distributed_world_size)
            finally:
                group.distributed_init_method = given

    distributed_utils.call_main = call_main


def _rank(index, main, cfg, kwargs):
    """One of the spawned processes; at its end it leaves out what Python does last.

    Whoever needs the GIL then, as gloo's threads do to let go of a tensor, aborts the process: now and then a run
    would end in SIGABRT, all trained and saved (pytorch issue 190489).
    """
    distributed_utils.distributed_main(index, main, cfg, kwargs)
    atexit._run_exitfuncs()  # fairseq closes its TensorBoard files there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wrap_cpu_models():
    """Lets the default ``--ddp-backend pytorch_ddp`` train on CPU.

    fairseq always names a device to DistributedDataParallel, which refuses one for a model on CPU.
    """
    if not _source_has(distributed_fairseq_model.DistributedFairseqModel, "device_ids=[args.device_id]"):
        return

    class DistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module, device_ids=None, output_device=None, **kwargs):
            if all(parameter.device.type == "cpu" for parameter in module.parameters()):
                device_ids = output_device = None
            super().__init__(module, device_ids=device_ids, output_device=output_device, **kwargs)

    distributed_fairseq_model.DistributedDataParallel = DistributedDataParallel


def gather_on_cpu():
    """Lets processes on CPU gather what they logged.

    ``all_gather_list`` goes through a CUDA buffer. On CPU fairseq-validate, and fairseq-train with
    a criterion whose logging outputs cannot be summed, end in "Found no NVIDIA driver".
    """
    original = distributed_utils.all_gather_list
    if not _source_has(original, "torch.cuda.ByteTensor"):
        return

    @functools.wraps(original)
    def all_gather_list(data, group=None, max_size=16384):
        group = distributed_utils.get_global_group() if group is None else group
        if torch.distributed.get_backend(group) != "gloo":
            return original(data, group, max_size)
        gathered = [None] * distributed_utils.get_world_size(group)
        torch.distributed.all_gather_object(gathered, utils.move_to_cpu(data), group)
        return gathered

    distributed_utils.all_gather_list = all_gather_list


def bf16_without_tpu():
    """Makes ``--bf16`` mean bfloat16 on the GPU or CPU at hand.

    Parsing it also sets ``tpu``, and without torch_xla the trainer then ends in "'NoneType' object
    has no attribute 'xla_device'". Where torch_xla is installed, or ``--tpu`` given, nothing changes.
    """
    original = options.parse_args_and_arch
    if distributed_utils.xm is not None or not _source_has(original, "args.tpu = True"):
        return

    @functools.wraps(original)
    def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
        parsed = original(parser, input_args, *args, **kwargs)
        namespace = parsed[0] if isinstance(parsed, tuple) else parsed  # a pair with parse_known
        if getattr(namespace, "bf16", False) and not _given("--tpu", input_args):
            namespace.tpu = False
        return parsed

    options.parse_args_and_arch = parse_args_and_arch


def fp16_on_cpu():
    """Makes ``--fp16`` work on CPU as ``--fp16 --fp16-no-flatten-grads`` does.

    The flat copy of the parameters asks for the current CUDA device: "Found no NVIDIA driver". Out of
    reach is the same error at an overflow, inside ``Trainer.train_step``; --bf16 cannot overflow so.
    """
    original = FP16Optimizer.build_optimizer
    if not _source_has(FP16Optimizer.build_fp32_params, "torch.cuda.current_device()"):
        return

    @functools.wraps(original)
    def build_optimizer(cls, cfg, params, **kwargs):
        if all(parameter.device.type == "cpu" for parameter in params):
            cfg.common.fp16_no_flatten_grads = True
        return original.__func__(cls, cfg, params, **kwargs)

    FP16Optimizer.build_optimizer = classmethod(build_optimizer)


def sacrebleu_scores():
    """Makes fairseq-generate's ``--sacrebleu`` choose the scorer that its help promises.

    Nothing but a warning reads the flag: the score is fairseq's tokenized BLEU4 all the same. It now
    stands for ``--scoring sacrebleu``; a ``--scoring`` on the command line still decides.
    """
    original = options.parse_args_and_arch

    @functools.wraps(original)
    def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
        if _given("--sacrebleu", input_args):
            parser.set_defaults(scoring="sacrebleu")
        return original(parser, input_args, *args, **kwargs)

    options.parse_args_and_arch = parse_args_and_arch


def refuse_to_train_nothing():
    """Ends ``--write-checkpoints-asynchronously`` without iopath in an error; fairseq logs one, trains nothing and exits 0."""
    original = options.parse_args_and_arch

    @functools.wraps(original)
    def parse_args_and_arch(parser, *args, **kwargs):
        parsed = original(parser, *args, **kwargs)
        namespace = parsed[0] if isinstance(parsed, tuple) else parsed
        if getattr(namespace, "write_checkpoints_asynchronously", False) and not importlib.util.find_spec("iopath"):
            parser.error("--write-checkpoints-asynchronously: needs iopath (pip install iopath)")
        return parsed

    options.parse_args_and_arch = parse_args_and_arch


def help_of_the_arch():
    """Makes ``--help`` show the flags of the ``--arch``, task, criterion and optimizer that are named beside it.

    fairseq looks for these names in a first parse, which meets ``--help`` and exits: no flag of a model is ever shown. That
    parse now goes without ``--help``. A training command that names no arch has the help it always had.
    """
    original = options.parse_args_and_arch
    if not _source_has(original, "args, _ = parser.parse_known_args(input_args)"):
        return

    @functools.wraps(original)
    def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
        given = sys.argv[1:] if input_args is None else input_args
        names = [argument for argument in given if argument not in ("-h", "--help")]
        if len(names) == len(given):
            return original(parser, input_args, *args, **kwargs)

        def first_parse(*_):
            del parser.parse_known_args  # the later parses are the parser's own
            parsed = parser.parse_known_args(names)
            if getattr(parsed[0], "arch", "") is None:  # fairseq would end in an error without words
                parser.parse_known_args(["--help"])
            return parsed

        parser.parse_known_args = first_parse
        return original(parser, input_args, *args, **kwargs)

    options.parse_args_and_arch = parse_args_and_arch


def _given(flag, input_args):
    return flag in (sys.argv[1:] if input_args is None else input_args)


def log_lines_once():
    """Lets ``--log-file`` have each line of training once.

    fairseq opens the file again for every epoch and closes none: a line of the tenth epoch is in it ten times.
    """
    original = progress_bar.progress_bar
    if not _source_has(original, "handler = logging.FileHandler(filename=log_file)"):
        return

    signature = inspect.signature(original)

    @functools.wraps(original)
    def once(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        opened = {h.baseFilename for h in progress_bar.logger.handlers if isinstance(h, logging.FileHandler)}
        path = given.arguments.get("log_file")
        if path is not None and os.path.abspath(path) in opened and os.path.exists(path):
            given.arguments["log_file"] = None
        return original(*given.args, **given.kwargs)

    progress_bar.progress_bar = once
