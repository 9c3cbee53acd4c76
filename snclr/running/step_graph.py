"""Replays a training step as one CUDA graph: --step-graph."""

import argparse
import contextlib
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch.optim import Optimizer

from ..loader import Batch
from .devices import has_graphs, send
from .distributed import world_size
from .errors import RunError, first_line

WARM_UP = 3  # steps before the capture: in the first ones, torch's libraries prepare their kernels


def build(
    args: argparse.Namespace,
    device: torch.device,
    amp: str,
    optimizer: Optimizer,
    say: Callable[[str], None],
) -> "StepGraph | None":
    """The StepGraph of a run with --step-graph on a GPU. None without the flag, and where it has no
    effect; then a note says why.
    """
    if not args.step_graph or not has_graphs(device):
        return None
    obstacles = {
        "with several ranks the host takes part in a step": world_size() > 1,
        "with fp16 the scale of the loss is not in the graph": amp == "fp16",
        "--micro-batch and --grad-checkpointing take the state of random numbers from the host": (
            args.micro_batch is not None or args.grad_checkpointing
        ),
        "--mix-neighbours draws random numbers on the host": args.mix_neighbours,
        "--compile graphs makes graphs of its own": args.compile == "graphs",
    }
    reason = next((reason for reason, applies in obstacles.items() if applies), None)
    if reason is None:
        return StepGraph(optimizer, device, say)
    say(f"note: --step-graph has no effect: {reason}")
    return None


class StepGraph:
    """Calls step(batch, **numbers). After WARM_UP calls it captures a call as a CUDA graph, and
    replays it from then on: the host issues one launch for all kernels of a step.

    A replay reads and writes the memory that the captured call did, and repeats what the host
    decided in it. So the batch and the numbers are copied into fixed buffers, the numbers as
    float64 tensors (). A number that is 0 stays a number: a step may take another course for it.
    The returned tensors are overwritten by the next call. A graph serves one kind of step; for
    another kind a new one is captured in its place.

    Steps that read a value on the host cannot be captured: they run without a graph, with a note.
    This is found in the last call before the capture. A capture that fails ends the run: it leaves
    torch's current stream, allocator and random numbers unfit for further steps. With torch 2.11,
    memory that two streams used, as that of each batch, would never be freed again.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, say: Callable[[str], None]):
        self.optimizer, self.device, self.say = optimizer, device, say
        self.stream = torch.cuda.Stream(device)
        self.kind = self.replay = None
        self.can_capture = True

    def __call__(self, step: Callable, batch: Batch, kind: tuple, **numbers: float) -> tuple:
        """What step returns: a tuple of tensors, or of tuples of them.

        kind: on what the course of the step depends, besides the numbers that are 0.
        """
        kind = *kind, *(name for name, number in numbers.items() if number == 0)
        if kind != self.kind:
            self.kind, self.calls, self.replay = kind, 0, None
            self.batch = Batch(
                torch.empty_like(batch.ids), list(map(torch.empty_like, batch.views))
            )
            self.values = torch.empty(len(numbers), dtype=torch.float64, device=self.device)
        self.calls += 1
        for buffer, new in zip(self.batch.views, batch.views, strict=True):
            buffer.copy_(new)
        self.batch.ids.copy_(batch.ids)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        self.values.copy_(send(values, self.device))

        pairs = zip(numbers.items(), self.values.unbind(), strict=True)
        shared = {name: value if number else number for (name, number), value in pairs}

        def call():
            return step(self.batch, **shared)

        if self.calls > WARM_UP and self.replay is None and self.can_capture:
            try:
                with capturable(self.optimizer):
                    self.replay, self.outputs = capture(call, self.stream)
            except RuntimeError as error:
                # the end of an invalid capture raises a second error, which does not name the cause
                reason = first_line(error.__context__ or error)
                raise RunError(
                    f"a step could not be captured as a CUDA graph ({reason}): resume with "
                    "--no-step-graph"
                ) from error
        if self.replay is not None:
            self.replay()
            return self.outputs
        if self.calls != WARM_UP or not self.can_capture:
            return on_stream(call, self.stream)
        with noted_waits() as waits:
            outputs = on_stream(call, self.stream)
        if waits:
            self.can_capture = False
            self.say(f"note: --step-graph has no effect: a step reads a value ({waits[0]})")
        return outputs


def on_stream(function: Callable, stream: torch.cuda.Stream) -> tuple:
    """function(), run in the stream, between what the current stream did before and does next."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        outputs = function()
    current.wait_stream(stream)
    return outputs


def capture(function: Callable, stream: torch.cuda.Stream) -> tuple[Callable, tuple]:
    """The replay of function(), and the tensors that each replay writes. Nothing is computed yet.

    Raises RuntimeError if the function reads a value on the host, or if memory is short.
    """
    graph = torch.cuda.CUDAGraph()
    # thread_local: meanwhile a thread of the loader may pin memory
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = function()
    return graph.replay, outputs


@contextlib.contextmanager
def noted_waits() -> Iterator[list[str]]:
    """A list that contains, after the block, where in it the host waited for a value of the GPU.

    It has what torch.cuda.set_sync_debug_mode detects. Other warnings of the block are not shown.
    """
    mode, waits = torch.cuda.get_sync_debug_mode(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    waits += [
        f"{os.path.basename(warning.filename)}, line {warning.lineno}"
        for warning in caught
        if "called a synchronizing" in str(warning.message)
    ]


@contextlib.contextmanager
def capturable(optimizer: Optimizer) -> Iterator[None]:
    """In the block, torch's optimisers allow a CUDA graph to capture their step. Else they refuse
    it, and would warn of every step outside of a graph that they allow it.
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value
