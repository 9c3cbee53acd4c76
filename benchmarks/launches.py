#!/usr/bin/env python3
"""Operations that a training step asks a GPU for, by part. Runs on a CPU, with small images.

    python benchmarks/launches.py

The accelerator is pretended (tests/accelerator.py), and so is autocast. Counted is every torch
operation on its tensors that is not a view and does more than allocate memory. On a GPU each
launches at least one kernel, so the host needs several microseconds for each. The number does not
depend on the sizes of images, batch and heads.
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections import Counter
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(1, os.path.join(sys.path[0], "tests"))

import torch
from accelerator import DEVICE, Accelerator, Remote
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import main_snclr
from benchmarks import measure
from benchmarks.objective import Dense, Problem, Streamed
from benchmarks.training import CIFAR, VIT, Training
from snclr import memory_bank, options, streamed
from snclr.datasets import sources
from snclr.running import step_graph

SMALL = "--dataset embedded --img-size 32 --snclr-dim 16 --snclr-mlp-dim 32 --bank-size 4000 -j 0"
RECIPES = {
    "ResNet-18, configs/cifar10_resnet18.args": [
        CIFAR,
        *f"{SMALL} -b 4 --width 8 --no-step-graph".split(),
    ],
    "ViT-S/16, configs/vit_small_imagenet.args": [VIT, *SMALL.split(), "-b", "4"],
}
IN_GRAPH = "ResNet-18, the same with --step-graph"
RECIPES[IN_GRAPH] = [*RECIPES["ResNet-18, configs/cifar10_resnet18.args"], "--step-graph"]
# part of a step: the functions (or files) on the call stack that show it; the first part that fits
LOG_LINE = "log line, every --print-freq steps"
PARTS = {
    LOG_LINE: {"step_metrics", "check", "seconds"},
    "backward": {"backward"},
    "crops, if images are in memory": {"crop_and_resize", "views"},
    "augmentation": {"augment.py", "operations.py"},
    "encoders and heads, forward": {"_project", "container.py"},
    "momentum average": {"_momentum_projections"},
    "objective and bank": {"objectives.py", "streamed.py", "memory_bank.py", "builder.py"},
    "gradient norm and optimiser": {"gradient_norm", "step_if_finite", "zero_grad"},
}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_KERNEL |= {"_unsafe_view", "lift_fresh", "_local_scalar_dense"}
# what CUDA's autocast computes in 16 bits and in float32, of the functions that a step calls
IN_16_BITS = {torch.nn.functional.linear, torch.conv2d, torch.matmul, torch.Tensor.matmul}
IN_16_BITS |= {torch.nn.functional.scaled_dot_product_attention}
IN_32_BITS = {torch.nn.functional.layer_norm}


class Counting(Accelerator):
    """Counts the operations of each part of a step: counts[part, name of the operation]; and the
    bytes of their inputs and outputs.
    """

    def __init__(self):
        super().__init__()
        self.counts, self.bytes = Counter(), 0

    def call(self, function, args, kwargs):
        out = super().call(function, args, kwargs)
        inputs, outputs = (
            [x for x in tree_leaves(tree) if isinstance(x, Remote)]
            for tree in ((args, kwargs), out)
        )
        if inputs + outputs and launches(function):
            self.counts[part_of_step(), function.overloadpacket.__name__] += 1
            self.bytes += sum(x.nbytes for x in inputs + outputs)
        return out


def launches(function: torch._ops.OpOverload) -> bool:
    """Whether an operation launches a kernel: it is no view and does more than allocate."""
    views = [x.alias_info for x in function._schema.returns]
    return function.overloadpacket.__name__ not in NO_KERNEL and not any(
        x is not None and not x.is_write for x in views
    )


def part_of_step() -> str:
    """The part of the step that the call stack shows."""
    names = set()
    for frame, _ in traceback.walk_stack(None):
        names |= {frame.f_code.co_name, os.path.basename(frame.f_code.co_filename)}
    return next((part for part, signs in PARTS.items() if signs & names), "rest")


class Autocast(TorchFunctionMode):
    """CUDA's autocast, as far as a step needs it: torch has none for the pretended device.

    A copy of a weight in 16 bits is kept for the whole region if the weight needs a gradient.
    """

    def __init__(self):
        super().__init__()
        self.region, self.copies = torch.autocast("cpu", torch.bfloat16), {}

    def __enter__(self):
        self.region.__enter__()  # changes nothing on the device, but `full_precision` can end it
        return super().__enter__()

    def __exit__(self, *error):
        self.region.__exit__(*error)
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dtype = {function in IN_16_BITS: torch.bfloat16, function in IN_32_BITS: torch.float32}
        if True in dtype and torch.is_autocast_enabled("cpu"):

            def cast(x):
                if not x.is_floating_point() or x.dtype == dtype[True]:
                    return x
                if not (x.is_leaf and x.requires_grad):
                    return x.to(dtype[True])
                if id(x) not in self.copies:
                    self.copies[id(x)] = x.to(dtype[True])
                return self.copies[id(x)]

            args, kwargs = tree_map_only(torch.Tensor, cast, (args, kwargs))
        if function is torch.nn.functional.scaled_dot_product_attention:  # one kernel, as on a GPU
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return function(*args, **kwargs)


@contextlib.contextmanager
def counting():
    """A pretended GPU that counts (Counting)."""
    stand_ins = [
        mock.patch.object(main_snclr, "autocast", lambda *_: Autocast()),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]),
        mock.patch.object(step_graph, "WARM_UP", 1),
    ]
    for sizes in (streamed.CHUNK_ELEMENTS, memory_bank.COSINES, memory_bank.CHUNK):
        stand_ins.append(mock.patch.dict(sizes, {DEVICE.type: sizes["cuda"]}))
    with contextlib.ExitStack() as stack:
        for stand_in in stand_ins:
            stack.enter_context(stand_in)
        yield stack.enter_context(Counting())


def count(flags: list[str]) -> Counter:
    """The operations of one step of main_snclr.py, by part and name."""
    with counting() as accelerator:
        train = sources.open_data(options.parse(flags))[0].to(DEVICE)
        training = Training(flags, train, DEVICE, turn=1)
        training()  # the optimiser's state is made in the first step
        if "--step-graph" in flags:
            training()  # with a learning rate above 0
            training()  # the graph is captured
        accelerator.counts.clear()
        training()
    return accelerator.counts


def count_objective(sizes: argparse.Namespace) -> list[list]:
    """Rows of a table: operations of objective and bank, and MB that they read and write."""
    lines = []
    with counting() as accelerator:
        problem = Problem(sizes, DEVICE)
        for name, side in {
            "dense, as released": Dense(problem),
            "ours": Streamed(problem, "float32"),
        }.items():
            accelerator.counts.clear()
            accelerator.bytes = 0
            side.step()
            lines.append([name, accelerator.counts.total(), f"{accelerator.bytes / 2**20:.0f}"])
    return lines


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--names", action="store_true", help="also count each operation by name")
    args = parser.parse_args()
    sizes = argparse.Namespace(batch=128, ranks=32, topk=30, bank=128000, dim=256)
    for title, flags in RECIPES.items():
        counts = count(flags)
        lines, total = [], Counter()
        for part in [*PARTS, "rest"]:
            names = Counter({name: n for (key, name), n in counts.items() if key == part})
            lines.append([part, names.total(), names["_to_copy"]])
            if args.names:
                lines += [[f"    {name}", n, ""] for name, n in names.most_common()]
            if part != LOG_LINE:
                total += names
        lines.append(["all but the log line", total.total(), total["_to_copy"]])
        print(measure.table([title, "operations", "of these casts"], lines), end="\n\n")
    title = "objective and bank, B 128, 32 ranks, K 30, M 128,000, D 256"
    head = [title, "operations", "MB read and written"]
    print(measure.table(head, count_objective(sizes)))


if __name__ == "__main__":
    main()
