#!/usr/bin/env python3
"""Pretraining.

    python main_snclr.py                           the small embedded data set, as a first try
    python main_snclr.py @configs/vit_small_imagenet.args /data/imagenet     a recipe and its data
    torchrun --nproc_per_node 8 main_snclr.py @configs/... /data/imagenet    all GPUs of a node

Flags after a recipe override it. This file reads from top to bottom: settings, data, model,
optimiser, resume, then epochs (evaluate, train, save).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from snclr import options
from snclr.running.errors import RunError, UsageError, check_packages, one_clear_line

if __name__ == "__main__":
    with one_clear_line("main_snclr.py"):
        options.parse(sys.argv[1:])  # report a wrong flag before the slow imports
        check_packages()

import torch
from torch import Tensor, nn

from snclr import augment, operations, optim
from snclr.builder import SNCLR, build_model
from snclr.datasets import sources
from snclr.datasets.images import ImageSet
from snclr.evaluation import knn, label_free
from snclr.evaluation.features import digest
from snclr.loader import Batch, EpochLoader, whole_images
from snclr.pictures import report, steps
from snclr.running import (
    bad_images,
    batch_norm,
    checkpoint,
    devices,
    distributed,
    lock,
    preemption,
    process_group,
    settings,
    step_graph,
    summary,
    tensor_files,
    workers,
)
from snclr.running.forward import can_compile, resolve_compile
from snclr.running.guard import Guard
from snclr.running.log import Log
from snclr.running.metrics import StepView, Waits, step_metrics
from snclr.running.precision import autocast, resolve_amp
from snclr.shared_options import check_workdir, is_restart
from snclr.weights import public
from snclr.weights.layouts import EncoderFile, choose_num_heads
from snclr.weights.load import check_start, load_backbone


class Run(NamedTuple):
    """What a training run works with."""

    args: argparse.Namespace
    workdir: str
    last_step: int  # the number of completed steps at which this start ends
    amp: str  # precision of the encoders: 'off', 'bf16' or 'fp16'
    model: SNCLR
    network: nn.Module  # the model, on several ranks within DistributedDataParallel
    loader: EpochLoader
    fingerprint: str  # of the training images
    val: ImageSet | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # disabled unless amp is 'fp16'
    guard: Guard
    interruptions: preemption.Interruptions
    log: Log
    graph: step_graph.StepGraph | None = None  # with --step-graph, where it has an effect

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.args.epochs * self.loader.steps_per_epoch

    @property
    def encoder(self) -> nn.Module:
        """The encoder that is evaluated, and saved as a separate file."""
        is_momentum = self.args.eval_encoder == "momentum"
        return self.model.momentum_encoder if is_momentum else self.model.base_encoder


@preemption.handlers_given_back()
@process_group.failures_named()
def main(argv: list[str]) -> None:
    args = options.parse(argv)

    # -- devices and data --------------------------------------------------------------------------
    device = process_group.start(args.timeout_minutes)
    preemption.end_at_once()
    args.compile = resolve_compile(args, device)
    train, val, data_notes = sources.open_data(args)
    train = train.to(device)
    recipe = augment.Recipe(args.seed, augment.build_views(args))
    augment_crops = choose_augmentation(args, device)
    loader = EpochLoader(train, recipe, args.batch_size, device, args.workers, augment_crops)
    steps_per_epoch = loader.steps_per_epoch

    # -- model and optimiser -----------------------------------------------------------------------
    torch.manual_seed(args.seed)
    amp = resolve_amp(args.amp, device)
    # the number of heads must be that of the weights to start from; no tensor shows it
    if args.init_from and (begun := settings_of_resumed(args)).get("init_from") == args.init_from:
        args.num_heads = args.num_heads or begun.get("num_heads")
    elif args.init_from:
        initial, timm_model = public.read_start(args.init_from, args.img_size)
        args.num_heads, head_notes = choose_num_heads(initial, args.arch, args.num_heads)
    model = build_model(args, products=devices.bank_products(amp, device))
    workdir, checkpoint_path, start_notes = distributed.on_rank_zero(lambda: open_workdir(args))
    if args.init_from and checkpoint_path:
        start_notes += [f"--init-from {args.init_from} is ignored: {checkpoint_path} is resumed"]
    elif args.init_from:
        start_notes += load_start(args, model, initial, timm_model) + head_notes
    # in float32 on a CPU channels-last is not faster, and torch 2.15 crashes in the backward of
    # narrow convolutions
    plain = device.type == "cpu" and amp == "off"
    layout = torch.preserve_format if plain else torch.channels_last
    model = batch_norm.synchronise_batch_norm(model.to(device, memory_format=layout), device)
    scales = optim.layer_scales(model.base_encoder, args.lr_scale, "base_encoder.", "--lr-scale")
    optimizer = optim.build_optimizer(args.optimizer, model, args.wd, scales)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    # -- resume ------------------------------------------------------------------------------------
    step, changes, fingerprint = 0, [], train.fingerprint()
    if len(kinds := distributed.union({f"{len(train)} images, {fingerprint}"})) > 1:
        raise UsageError(f"the ranks have different training images: {'; '.join(sorted(kinds))}")
    if checkpoint_path:
        step, changes = checkpoint.resume(
            checkpoint_path,
            model,
            optimizer,
            scaler,
            args=args,
            on_resume=options.ON_RESUME,
            images=len(train),
            fingerprint=fingerprint,
        )
    frozen_steps = args.freeze_backbone_epochs * steps_per_epoch
    model.freeze_backbone(step < frozen_steps)
    is_rank_zero = distributed.rank() == 0
    if is_rank_zero:
        if checkpoint_path and args.resume != "auto":
            start_notes += checkpoint.abandon_later(workdir, step)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        hardware = {"world_size": distributed.world_size(), "amp_used": amp, "device": name}
        settings.save_settings(workdir, args, hardware)
    log = Log(workdir, step=step, enabled=is_rank_zero, args=args)
    interruptions = preemption.Interruptions(args.save_every_minutes, args.timeout_minutes)
    loader.stop_waiting_if(lambda: interruptions.signal > 0)
    run = Run(
        args=args,
        workdir=workdir,
        last_step=min(
            args.epochs * steps_per_epoch,
            (args.stop_after_epochs or args.epochs) * steps_per_epoch,
            args.stop_after_steps or args.epochs * steps_per_epoch,
        ),
        amp=amp,
        model=model,
        network=distributed.replicate(model, device),
        loader=loader,
        fingerprint=fingerprint,
        val=val,
        optimizer=optimizer,
        scaler=scaler,
        guard=Guard(model, loader, workdir, limit=args.skip_non_finite, scaler=scaler),
        interruptions=interruptions,
        log=log,
        graph=step_graph.build(args, device, amp, optimizer, log.say),
    )
    log.say(
        f"{args.method} {args.arch}, {args.dataset} ({len(train)} images, {args.img_size} px), "
        f"batch {args.batch_size}"
    )
    log.say(
        f"{distributed.world_size()} x {device.type}, amp {amp}, {steps_per_epoch} steps an epoch, "
        f"in {workdir}"
    )
    for note in data_notes + start_notes + setting_notes(args, model, len(train), device):
        log.say(f"note: {note}")
    if checkpoint_path:
        run.guard.saved_step = step
        resumed = f"resumed from {checkpoint_path} after step {step} of {run.total_steps}"
        log.say("; ".join([resumed, *changes]))

    # -- epochs ------------------------------------------------------------------------------------
    evaluated_step = distributed.on_rank_zero(log.last_evaluation)
    while True:
        if ends_period(run, step, args.eval_freq) and step != evaluated_step:
            evaluate(run, step)
        if step >= run.last_step:
            break
        if model.backbone_is_frozen and step >= frozen_steps:
            model.freeze_backbone(False)
            run = run._replace(network=distributed.replicate(model, device))
            log.say("the backbone is trained from here on")
        step, batch = train_epoch(run, step)
        if is_save_due(run, step):
            save(run, step, batch)
        del batch  # its memory is needed in the next epoch
        if run.interruptions.ending:
            break

    # -- end ---------------------------------------------------------------------------------------
    digests = distributed.union({digest(model)})
    if distributed.world_size() > 1:
        result = "the same" if len(digests) == 1 else "NOT the same"
        log.say(f"weights and bank of the ranks: {result}, {', '.join(digests)}")
    if is_rank_zero and not run.interruptions.ending:
        log.say(
            summary.final_lines(
                args,
                workdir,
                os.path.join(workdir, checkpoint.LAST),
                done=step >= run.total_steps,
            )
        )
        log.say(report.write_into(workdir))
    run.interruptions.maximum.finish()
    try:
        # SLURM may kill this rank when another has left, and a logger may wait for its network for
        # long: the job is requeued before
        if run.interruptions.ending:
            preemption.interrupt(run.interruptions.ending, run.interruptions.outcome)
    finally:
        log.close()
        process_group.stop()


def choose_augmentation(args: argparse.Namespace, device: torch.device) -> Callable[..., Tensor]:
    """operations.apply, or with --fused-augment its like for RGB images on a GPU. Raises UsageError
    if it cannot be compiled.
    """
    if not args.fused_augment or args.channels != 3 or device.type != "cuda":
        return operations.apply
    if not can_compile():
        raise UsageError("--fused-augment needs triton and a C compiler, such as gcc")
    from snclr import fused_augment

    return fused_augment.apply


def open_workdir(args: argparse.Namespace) -> tuple[str, str | None, list[str]]:
    """Lock the folder of this run, so that no other run writes into it.

    Returns the folder, the checkpoint to resume (None: a new run), and lines about damaged
    checkpoints.
    """
    path = args.resume if args.resume != "auto" else None
    workdir = args.workdir
    if workdir is None:
        workdir = os.path.dirname(os.path.abspath(path)) if path else default_workdir(args)
        check_workdir(workdir, args.resume, options.RUN_FILES)  # a SLURM job may start several runs
    lock.hold(workdir, "main_snclr")
    last = os.path.join(workdir, checkpoint.LAST)
    goes_on = args.resume == "auto"
    if path is not None and is_restart() and os.path.isfile(last):
        # this command went back to an older checkpoint when it first started: not once more
        goes_on = settings.saved_settings(workdir).get("command") == settings.command()
    if not goes_on:
        return workdir, path, []
    newest, notes = checkpoint.newest(workdir)
    if newest not in (None, last):
        # the run ended between the numbered checkpoint and checkpoint_last: write the latter now
        tensor_files.save(last, tensor_files.read(newest))  # renames no other: `newest` stays
    return workdir, newest, notes


def settings_of_resumed(args: argparse.Namespace) -> dict:
    """The saved settings of the run that is resumed; {} if there is none, or no checkpoint of it.

    It needs the weights of --init-from no more, which may have been removed since.
    """
    folder = args.workdir or default_workdir(args)
    if args.resume not in (None, "auto"):
        folder = os.path.dirname(args.resume)
    has_checkpoint = os.path.isfile(os.path.join(folder, checkpoint.LAST))
    saved = settings.saved_settings(folder) if args.resume and has_checkpoint else {}
    # somebody may have changed the file
    return saved if saved.get("num_heads") in (None, *range(1, 2**10)) else {}


def default_workdir(args: argparse.Namespace) -> str:
    """A folder in runs/, named by settings and start time, or by the SLURM job if there is one: a
    restarted job must find its folder again.
    """
    arch = args.arch.replace(":", "-")  # for rsync and scp the part before a colon is a host
    start = os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")
    return os.path.join("runs", f"{args.method}-{arch}-{args.dataset}-{start}")


def load_start(
    args: argparse.Namespace, model: SNCLR, file: EncoderFile, timm_model: nn.Module | None
) -> list[str]:
    """Load the weights of --init-from into both encoders. Returns lines about what was loaded.

    timm_model: the model of these weights if they come from timm. Raises UsageError if the encoder
    computes other features than the weights' own model.
    """
    encoder = model.base_encoder
    notes = load_backbone(encoder, file)
    if model.momentum_encoder is not None:
        model.momentum_encoder.load_state_dict(encoder.state_dict())
    if timm_model is not None:
        images = torch.randn(2, args.channels, args.img_size, args.img_size)
        public.check_features(args.init_from, timm_model, encoder, images)
    else:
        check_start(file, encoder, args.arch, args.img_size, args.num_heads)
    own_images = file.settings if timm_model is None else timm_model.pretrained_cfg
    return notes + public.other_images(own_images, args.mean, args.std)


def setting_notes(
    args: argparse.Namespace, model: SNCLR, num_images: int, device: torch.device
) -> list[str]:
    """Lines about settings that work, but may not do what the user expects."""
    has_no_graphs = not devices.has_graphs(device)
    notes = (
        (
            model.memory_bank is not None and args.bank_size > num_images,
            f"the bank ({args.bank_size} rows) is larger than the data set ({num_images} images): "
            "it holds several copies of each image",
        ),
        (
            args.compile == "graphs" and has_no_graphs,
            "--compile graphs: only a GPU has graphs; the backbones are compiled",
        ),
        (args.step_graph and has_no_graphs, "--step-graph: only a GPU has graphs"),
        (
            args.fused_augment and choose_augmentation(args, device) is operations.apply,
            "--fused-augment is for RGB images on a GPU: no effect",
        ),
    )
    return [note for applies, note in notes if applies] + options.unused_flags(args)


def train_epoch(run: Run, step: int) -> tuple[int, Batch | None]:
    """Train from `step` completed steps to the end of the epoch. Returns the completed steps and
    the last batch (None if there was none).

    An interruption or run.last_step ends the training earlier.
    """
    args, loader, log = run.args, run.loader, run.log
    run.network.train()
    epoch, inside = divmod(step, loader.steps_per_epoch)
    end = min((epoch + 1) * loader.steps_per_epoch, run.last_step)
    labels = loader.images.labels
    if labels is not None:
        labels = labels.to(loader.device, non_blocking=True)
    go_on = end < run.last_step and not ends_period(run, end, args.eval_freq)
    batch, batches = None, loader.epoch(epoch, inside, go_on=go_on)
    bar = log.progress(loader.steps_per_epoch, inside, f"epoch {epoch + 1}/{args.epochs}")
    waits = Waits(loader.device)
    logged_step, logged_at, slowest = step, time.perf_counter(), 0.0

    while step < end:
        step_start = time.perf_counter()
        try:
            with waits:
                batch = next(batches)
        except workers.Stalled:
            if run.interruptions.end_here(run.guard.last_sound_checkpoint):
                run.guard.check()
                break
            raise

        lr = optim.learning_rate(
            step,
            peak=args.lr * args.batch_size / 256,
            steps_per_epoch=loader.steps_per_epoch,
            warmup_epochs=args.warmup_epochs,
            epochs=args.epochs,
        )
        momentum = optim.encoder_momentum(
            step, start=args.snclr_m, total_steps=run.total_steps, cosine=args.snclr_m_cos
        )
        # dropout and the like depend on the step: a resumed run has no generator to restore
        torch.manual_seed(int(augment.keyed_bits(args.seed, step, distributed.rank())) >> 1)
        mass = optim.neighbour_mass(
            step,
            full=args.nn_mass,
            steps_per_epoch=loader.steps_per_epoch,
            warmup_epochs=args.nn_warmup_epochs,
            ramp_epochs=args.nn_ramp_epochs,
        )
        numbers = {"lr": lr, "momentum": momentum, "mass": mass}
        take_step = partial(train_step, run, step=step)
        if run.graph is None:
            loss, shown, grad_norm = take_step(batch, **numbers)
        else:
            kind = (run.model.backbone_is_frozen,)
            loss, shown, grad_norm = run.graph(take_step, batch, kind, **numbers)
            optim.set_learning_rate(run.optimizer, lr)  # a number again, for the checkpoint
        step += 1
        bar.update()
        if run.interruptions.due():
            end = step
        run.guard.watch(loss, grad_norm, step)
        slowest = max(slowest, time.perf_counter() - step_start)

        if step % args.print_freq == 0 or step == end:
            metrics = step_metrics(
                loss,
                shown,
                batch.ids,
                labels,
                method=args.method,
                form=args.form,
                temperature=args.snclr_t,
                normalised=args.normalise_positives,
            )
            notes = run.guard.check(), run.guard.collapse(metrics["feature_std"])
            for note in filter(None, notes):
                log.say(f"note: {note}")
            seconds = time.perf_counter() - logged_at
            metrics = {
                "epoch": epoch + 1,
                "step": step,
                **metrics,
                "lr": lr,
                "momentum": momentum,
                "grad_norm": grad_norm.item(),
                "images_per_s": (step - logged_step) * args.batch_size / seconds,
                "data_wait": waits.seconds() / seconds,
                "slowest_step_s": slowest,
            }
            log.line(metrics)
            images_left = (run.last_step - step) * args.batch_size
            log.say(summary.describe(metrics, args.epochs, run.total_steps, images_left))
            logged_step, logged_at, slowest = step, time.perf_counter(), 0.0

    bar.close()
    if batch is not None and ends_period(run, step, args.viz_freq):
        log.pictures(step, lambda: steps.of_step(batch, shown, loader.images, args, step))
    if note := bad_images.record_bad_images(loader.images.image, loader.replaced, run.workdir):
        log.say(f"note: {note}")
    return step, batch


def train_step(
    run: Run,
    batch: Batch,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    mass: float | Tensor,
    step: int,
) -> tuple[Tensor, StepView, Tensor]:
    """Forward, backward and a step of the optimiser. Reads no value on the host.

    Returns the loss (), what is shown of the step, and the norm () of the gradient.
    """
    optim.set_learning_rate(run.optimizer, lr)
    with autocast(run.amp, run.loader.device):
        loss, shown = run.network(batch.views, batch.ids, momentum, mass, step)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    grad_norm = optim.gradient_norm(run.optimizer)
    optim.step_if_finite(run.optimizer, run.scaler, grad_norm)
    run.scaler.update()
    return loss.detach(), shown, grad_norm


def is_save_due(run: Run, step: int) -> bool:
    """Whether to save after train_epoch: always, but on a single GPU only if saves take little of
    the time. An epoch of small images may take a second there. All steps are saved before an
    evaluation, for a numbered checkpoint, and at the end of a run.
    """
    return (
        step % run.loader.steps_per_epoch > 0  # within an epoch
        or step >= run.last_step
        or run.interruptions.ending > 0
        or ends_period(run, step, run.args.save_freq)
        or ends_period(run, step, run.args.eval_freq)
        or run.loader.device.type != "cuda"
        or distributed.world_size() > 1
        or run.interruptions.save_is_cheap()
    )


def save(run: Run, step: int, batch: Batch | None) -> None:
    """Save checkpoint and encoder, from rank 0; also under a number every --save-freq epochs.

    If the weights, the optimiser state or the loss of `batch` with them are not finite, only
    checkpoint.UNSOUND is written, so that the last sound checkpoint stays. After a skipped step the
    batch of an earlier one is taken. If a save fails, the run continues with a note; at its last
    save it raises RunError.
    """
    args, is_last, start = run.args, step >= run.last_step, time.perf_counter()
    epoch, inside = divmod(step, run.loader.steps_per_epoch)
    if step in run.guard.bad_steps:  # skipped: the cause may be its batch, and not the weights
        batch = run.guard.finite_batch(step)
    is_usable = batch is None or run.guard.try_forward(run.model, batch, args.snclr_m, run.amp)
    reason = run.guard.what_is_unsound(step, run.model, run.optimizer, is_usable)
    outcome = "saved" if reason is None else f"saved as {checkpoint.UNSOUND}"
    if distributed.rank() == 0:
        is_numbered = args.save_freq and not inside and epoch % args.save_freq == 0
        names = [f"{epoch:04d}", "last"] if is_numbered else ["last"]
        state = checkpoint.pack(
            run.model,
            run.optimizer,
            run.scaler,
            args=args,
            epoch=epoch,
            step=step,
            images=len(run.loader.images),
            fingerprint=run.fingerprint,
        )
        encoder = checkpoint.pack_encoder(
            run.encoder, args.eval_encoder, args=args, epoch=epoch, step=step
        )
        try:
            if reason is None:
                write_files(run, state, encoder, names)
            else:
                tensor_files.save(os.path.join(run.workdir, checkpoint.UNSOUND), state)
        except RunError as error:
            if not os.path.lexists(run.workdir):
                raise RunError(f"{run.workdir} was deleted or renamed during the run") from error
            if is_last or run.interruptions.ending:
                raise
            run.log.say(f"note: {error}; the run goes on and tries again at the next save")
            outcome = "not saved, the checkpoint before is whole"
    if reason is not None:
        outcome = f"{reason}: {outcome}; {run.guard.last_sound_checkpoint}"
        if is_last:
            raise RunError(outcome)
        run.log.say(f"note: {outcome}")
    elif outcome == "saved":
        run.guard.saved_step = step
    run.interruptions.saved(outcome, time.perf_counter() - start)


def write_files(run: Run, state: dict, encoder: dict, names: list[str]) -> None:
    """Write the encoder and the checkpoint under each name: a number, 'last'.

    checkpoint_last is written at the end. So after a crash in between, the run resumes from the
    previous checkpoint, and writes all files again.
    """
    run.log.flush(durable=True)
    for name in names:
        tensor_files.save(os.path.join(run.workdir, f"encoder_{name}.pth.tar"), encoder)
    for name in names:
        keep = run.args.keep if name == "last" else 1
        tensor_files.save(os.path.join(run.workdir, f"checkpoint_{name}.pth.tar"), state, keep)


def ends_period(run: Run, step: int, frequency: int) -> bool:
    """Whether something that happens every `frequency` epochs (0: never), and at the end of the
    schedule, happens after `step` completed steps.
    """
    epoch, inside = divmod(step, run.loader.steps_per_epoch)
    return frequency > 0 and not inside and (epoch % frequency == 0 or epoch == run.args.epochs)


def evaluate(run: Run, step: int) -> None:
    """Log how good the features of the encoder are, with labels (kNN) and without.

    At the start of a run this is the untrained encoder, or that of --init-from. For small images
    the raw pixels are evaluated as well. Training should exceed both.
    """
    args, train, val, device = run.args, run.loader.images, run.val, run.loader.device
    load = partial(whole_images, size=args.img_size, device=device, workers=args.workers)
    epoch, name = step // run.loader.steps_per_epoch, args.eval_encoder
    result, parts, title = {}, [], f"{name} encoder"
    with run.interruptions.nothing_unsaved():
        if step == 0 and val is not None and args.img_size <= 64:
            pixels = knn.accuracy(lambda x: x.flatten(1), train, val, load, device)["knn_top1"]
            result["raw_pixels_knn_top1"] = pixels
            run.log.say(f"epoch 0/{args.epochs}  kNN top-1 {pixels:.2f} % (raw pixels)")
        encoder, amp = run.encoder.eval(), run.amp
        if step == 0 and args.init_from:
            title = name = f"start (from {args.init_from})"
        elif step == 0:
            # the running statistics of its batch norms are not those of any images yet
            encoder = knn.calibrated_copy(run.model.base_encoder, train, load)
            title, name, amp = "untrained encoder", None, "off"
        with autocast(amp, device):
            signals = label_free.signals(encoder.embed, run.loader)
            if signals is not None and val is not None:
                result |= knn.accuracy(encoder.embed, train, val, load, device)
                parts.append(f"kNN top-1 {result['knn_top1']:.2f} %")
    if signals is None:
        run.log.say(f"note: epoch {epoch} is not evaluated: the features are not finite ({title})")
    else:
        result |= signals
        parts.append(f"effective rank {result['effective_rank']:.1f}")
        parts.append(f"view agreement {result['view_agreement']:.3f}")
        run.log.say(f"epoch {epoch}/{args.epochs}  {'  '.join(parts)} ({title})")
    if name is not None:
        result["encoder"] = name
    run.log.line({"epoch": epoch, "step": step, **result})


if __name__ == "__main__":
    with one_clear_line("main_snclr.py"):
        main(sys.argv[1:])
