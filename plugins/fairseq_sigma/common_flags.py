"""Flags of fairseq-train for any architecture and task.

They become fields of `cfg.common`, added where fairseq composes its configuration. There they are pickled into the processes
that it spawns, fairseq-hydra-train can name them too (`+common.monitor_every=100`), and a run without the flag has the
configuration it always had. (An environment variable would outlive the run; the namespace of arguments does not reach tasks
and models that have dataclasses.) fairseq builds nothing from a checkpoint's `common`: checkpoints with and without the keys
load alike.
"""

import argparse
import functools

from fairseq import options
from fairseq.dataclass import utils as dataclass_utils


def add_common_flags(title: str, **flags: dict) -> None:
    """Flags by their fields' names, with what argparse takes of each; without a flag its field is not there."""
    add_optimization_args = options.add_optimization_args  # a part of the training parser only
    override_module_args = dataclass_utils.override_module_args

    @functools.wraps(add_optimization_args)
    def with_flags(parser):
        group = parser.add_argument_group(title)
        for name, settings in flags.items():
            group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **settings)
        return add_optimization_args(parser)

    @functools.wraps(override_module_args)
    def with_overrides(args):
        overrides, deletes = override_module_args(args)
        given = {name: getattr(args, name, None) for name in flags}
        return [*overrides, *(f"+common.{name}={value}" for name, value in given.items() if value)], deletes

    options.add_optimization_args, dataclass_utils.override_module_args = with_flags, with_overrides
