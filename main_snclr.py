#!/usr/bin/env python3
"""Pretraining.

    python main_snclr.py                                                    the embedded data set, to see it work
    python main_snclr.py @configs/vit_small_imagenet.args /data/imagenet    a recipe; later flags override it
    torchrun --nproc_per_node 8 main_snclr.py @configs/... /data/imagenet   the same on all GPUs of a node

Reads from top to bottom: settings, data, model, optimiser, resume, epochs (train, evaluate, save).
"""

import datetime
import os
import sys
import time

from snclr import options
from snclr.running.errors import RunError, UsageError, one_clear_line

if __name__ == "__main__":
    with one_clear_line("main_snclr.py"):
        options.parse(sys.argv[1:])  # a wrong flag is answered here, before the slow imports

import torch

from snclr import augment, optim
from snclr.builder import build_model
from snclr.datasets import sources
from snclr.evaluation import knn, label_free
from snclr.evaluation.features import digest
from snclr.loader import TwoViewLoader
from snclr.pictures import report, steps
from snclr.running import checkpoint, distributed, process_group, summary, tensor_files
from snclr.running.bad_images import record_bad_images
from snclr.running.batch_norm import synchronise_batch_norm
from snclr.running.guard import Guard
from snclr.running.lock import hold
from snclr.running.log import Log
from snclr.running.metrics import Waits, step_metrics
from snclr.running.precision import autocast, resolve_amp
from snclr.running.preemption import Interruptions, end_at_once, handlers_given_back, interrupt
from snclr.running.settings import save_settings
from snclr.weights.layouts import read_encoder
from snclr.weights.load import choose_num_heads, load_backbone


@handlers_given_back()
@process_group.failures_named()
def main(argv: list[str]) -> None:
    args = options.parse(argv)

    # -- devices and data ------------------------------------------------------------------------------------------------
    device = process_group.start(args.timeout_minutes)
    end_at_once()
    train, val, data_notes = sources.open_data(args)
    if args.batch_size > len(train):
        raise UsageError(f"--batch-size {args.batch_size} exceeds the {len(train)} training images")
    train = train.to(device)
    recipe = augment.Recipe(args.seed, augment.build_views(args))
    loader = TwoViewLoader(train, recipe, args.batch_size, device, args.workers)
    steps_per_epoch = loader.steps_per_epoch
    total_steps = args.epochs * steps_per_epoch

    # -- model and optimiser ---------------------------------------------------------------------------------------------
    torch.manual_seed(args.seed)
    amp = resolve_amp(args.amp, device)
    # in float32 on a CPU channels-last gains nothing, and torch 2.15 crashes in the backward of narrow convolutions
    channels_last = device.type == "cuda" or amp != "off"
    if args.init_from:  # no tensor shows the number of heads: it is that of the weights to start from
        args.num_heads, head_notes = choose_num_heads(
            read_encoder(args.init_from), args.arch, args.num_heads
        )
    model = build_model(args, bfloat16=amp == "bf16")
    workdir, found, start_notes = distributed.on_rank_zero(lambda: open_workdir(args))
    if args.init_from and not found:
        start_notes += load_backbone(model.base_encoder, read_encoder(args.init_from)) + head_notes
        if model.momentum_encoder is not None:
            model.momentum_encoder.load_state_dict(model.base_encoder.state_dict())
    elif args.init_from:
        start_notes += [f"--init-from {args.init_from} is left aside: the run goes on from {found}"]
    model = model.to(
        device, memory_format=torch.channels_last if channels_last else torch.preserve_format
    )
    model = synchronise_batch_norm(model, device)
    optimizer = optim.build_optimizer(args.optimizer, model, args.wd)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    # -- resume ----------------------------------------------------------------------------------------------------------
    step, changed, which = 0, [], dict(images=len(train), fingerprint=train.fingerprint())
    if found:
        step, changed = checkpoint.resume(found, model, optimizer, scaler, args=args, **which)
    speaks = distributed.rank() == 0
    if speaks:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        save_settings(
            workdir, args, {"world_size": distributed.world_size(), "amp_used": amp, "device": name}
        )
    log = Log(workdir, step=step, enabled=speaks)
    log.say(
        f"{args.method} {args.arch}, {args.dataset} ({len(train)} images, {args.img_size} px), batch {args.batch_size}"
    )
    log.say(
        f"{distributed.world_size()} x {device.type}, amp {amp}, {steps_per_epoch} steps an epoch, in {workdir}"
    )
    for note in data_notes + start_notes + notes(args, len(train)):
        log.say(f"note: {note}")
    if found:
        log.say(
            f"resumed from {found} after step {step} of {total_steps}"
            + "".join(f"; {change}" for change in changed)
        )

    # -- epochs ----------------------------------------------------------------------------------------------------------
    network = distributed.replicate(model, device)
    guard = Guard(model, loader, workdir, limit=args.skip_non_finite, scaled=scaler.is_enabled())
    interruptions = Interruptions(args.save_every_minutes, args.timeout_minutes)
    evaluated = distributed.on_rank_zero(log.last_evaluation)
    last_step = min(
        total_steps,
        (args.stop_after_epochs or args.epochs) * steps_per_epoch,
        args.stop_after_steps or total_steps,
    )
    while True:
        epoch, inside = divmod(step, steps_per_epoch)
        if (
            args.eval_freq
            and not inside
            and (epoch % args.eval_freq == 0 or epoch == args.epochs)
            and step != evaluated
        ):
            with interruptions.nothing_unsaved():
                judged = (model, loader, val, amp, args, log, epoch)
                result = (
                    evaluate(*judged) if step else evaluate_start(model, loader, val, args, log)
                )
            log.line({"epoch": epoch, "step": step, **result})
        if step >= last_step:
            break
        schedule = dict(amp=amp, step=step, last_step=last_step)
        step = train_epoch(
            network, loader, optimizer, scaler, guard, interruptions, log, args, **schedule
        )
        if note := record_bad_images(train, loader.replaced, workdir):
            log.say(f"note: {note}")
        told = "saved"
        if speaks:
            epoch, inside = divmod(step, steps_per_epoch)
            state = checkpoint.pack(
                model, optimizer, scaler, args=args, epoch=epoch, step=step, **which
            )
            encoder = checkpoint.pack_encoder(
                judged_encoder(model, args), args.eval_encoder, args=args, epoch=epoch
            )
            numbered = args.save_freq and not inside and epoch % args.save_freq == 0
            try:
                save(workdir, state, encoder, [f"{epoch:04d}"] if numbered else [], args.keep, log)
            except RunError as error:
                if step >= last_step or interruptions.ending:
                    raise
                log.say(f"note: {error}; the run goes on and tries again at the next save")
                told = "not saved, the checkpoint before is whole"
        interruptions.saved(told)
        if interruptions.ending:
            break
    digests = distributed.union({digest(model)})
    if distributed.world_size() > 1:
        agree = "the same" if len(digests) == 1 else "NOT the same"
        log.say(f"weights and bank of the ranks: {agree}, {', '.join(digests)}")
    if speaks and not interruptions.ending:
        log.say(summary.final_lines(workdir, done=step == total_steps))
        log.say(report.write_into(workdir))
    interruptions.maximum.finish()
    log.close()
    process_group.stop()
    if interruptions.ending:
        interrupt(interruptions.ending, "saved")


def open_workdir(args) -> tuple[str, str | None, list[str]]:
    """The folder of this run, locked from now on; the checkpoint to go on from, if any; what a user should know of it."""
    path = args.resume if args.resume != "auto" else None
    workdir = args.workdir or (
        os.path.dirname(os.path.abspath(path)) if path else default_workdir(args)
    )
    hold(workdir, "main_snclr")
    if args.resume != "auto":
        return workdir, path, []
    found, told = checkpoint.newest(workdir)
    last = os.path.join(workdir, checkpoint.LAST)
    if found not in (
        None,
        last,
    ):  # a crash between two files: what was not written any more is written now
        tensor_files.save(last, tensor_files.read(found), args.keep)
    return workdir, found, told


def save(workdir, state, encoder, numbered: list[str], keep: int, log) -> None:
    """Leave the encoder alone and the checkpoint, as the last ones and under a number, if one is given. A run goes on from the
    checkpoint, so that whatever a crash kept from being written before it is written again."""
    log.flush(durable=True)
    for name in (*numbered, "last"):
        tensor_files.save(os.path.join(workdir, f"encoder_{name}.pth.tar"), encoder)
    for name in numbered:
        tensor_files.save(os.path.join(workdir, f"checkpoint_{name}.pth.tar"), state)
    tensor_files.save(os.path.join(workdir, checkpoint.LAST), state, keep)


def train_epoch(
    network,
    loader,
    optimizer,
    scaler,
    guard,
    interruptions,
    log,
    args,
    *,
    amp: str,
    step: int,
    last_step: int,
) -> int:
    """Train from `step` (completed so far) to the end of its epoch, at most to last_step or an interruption; returns the
    completed steps."""
    network.train()
    steps_per_epoch = loader.steps_per_epoch
    total_steps = args.epochs * steps_per_epoch
    epoch, inside = divmod(step, steps_per_epoch)
    end = min((epoch + 1) * steps_per_epoch, last_step)
    labels = (
        None
        if loader.images.labels is None
        else loader.images.labels.to(loader.device, non_blocking=True)
    )
    neighbours_from = args.nn_warmup_epochs * steps_per_epoch
    batches = loader.epoch(epoch, inside)
    log.progress(steps_per_epoch, inside, f"epoch {epoch + 1}/{args.epochs}")
    interval_start, interval_steps, slowest, waits = (
        time.perf_counter(),
        0,
        0.0,
        Waits(loader.device),
    )

    while step < end:
        step_start = time.perf_counter()
        with waits:
            batch = next(batches)

        lr = optim.learning_rate(
            step,
            peak=args.lr * args.batch_size / 256,
            steps_per_epoch=steps_per_epoch,
            warmup_epochs=args.warmup_epochs,
            epochs=args.epochs,
        )
        momentum = optim.encoder_momentum(
            step, start=args.snclr_m, total_steps=total_steps, cosine=args.snclr_m_cos
        )
        optim.set_learning_rate(optimizer, lr)
        # stochastic layers too draw from a key, so that a resumed run has no generator to restore
        torch.manual_seed(int(augment.keyed_bits(args.seed, step, distributed.rank())) >> 1)
        with autocast(amp, loader.device):
            loss, shown = network(batch.views, batch.ids, momentum, step >= neighbours_from)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        step += 1
        interval_steps += 1
        log.advance()
        if interruptions.due():
            end = step
        is_logged = step % args.print_freq == 0 or step == end
        scaler.unscale_(optimizer)
        grad_norm = optim.gradient_norm(optimizer)
        guard.watch(loss, grad_norm, step)
        optim.step_if_finite(optimizer, scaler, grad_norm)
        scaler.update()
        slowest = max(slowest, time.perf_counter() - step_start)

        if is_logged:
            metrics = step_metrics(
                loss,
                shown,
                batch.ids,
                labels,
                method=args.method,
                form=args.form,
                temperature=args.snclr_t,
            )
            for told in filter(None, (guard.check(), guard.collapse(metrics["feature_std"]))):
                log.say(f"note: {told}")
            seconds = time.perf_counter() - interval_start
            metrics = {
                "epoch": epoch + 1,
                "step": step,
                **metrics,
                "lr": lr,
                "momentum": momentum,
                "grad_norm": grad_norm.item(),
            }
            metrics["images_per_s"] = interval_steps * args.batch_size / seconds
            metrics["data_wait"] = waits.seconds() / seconds
            metrics["slowest_step_s"] = slowest
            log.line(metrics)
            log.say(summary.describe(metrics, args.epochs, total_steps))
            interval_start, interval_steps, slowest = time.perf_counter(), 0, 0.0
    log.end_progress()
    completed, inside = divmod(step, steps_per_epoch)
    if (
        log.enabled
        and args.viz_freq
        and not inside
        and (completed % args.viz_freq == 0 or completed == args.epochs)
    ):
        log.pictures(step, *steps.of_step(batch, shown, loader.images, args, step))
    return step


def judged_encoder(model, args):
    """The encoder that is evaluated, and left beside the checkpoint."""
    return model.momentum_encoder if args.eval_encoder == "momentum" else model.base_encoder


def evaluate(model, loader, val, amp, args, log, epoch) -> dict:
    """What the trained encoder's features are worth, with labels (kNN, in percent) and without."""
    encoder = judged_encoder(model, args)
    encoder.eval()
    with autocast(amp, loader.device):
        result = judge(
            encoder.embed,
            loader,
            val,
            args,
            log,
            f"epoch {epoch}/{args.epochs}  ",
            f"{args.eval_encoder} encoder",
        )
    encoder.train()
    return {**result, "encoder": args.eval_encoder}


def evaluate_start(model, loader, val, args, log) -> dict:
    """The same of the untrained encoder and, for small images, of raw pixels: what learning has to beat."""
    result, start = {}, f"epoch 0/{args.epochs}  "
    where = dict(size=args.img_size, device=loader.device, workers=args.workers)
    if val is not None and args.img_size <= 64:
        result["raw_pixels_knn_top1"] = knn.accuracy(
            lambda x: x.flatten(1), loader.images, val, **where
        )
        log.say(f"{start}kNN top-1 {result['raw_pixels_knn_top1']:.2f} % (raw pixels)")
    untrained = knn.calibrated_copy(model.base_encoder, loader.images, **where)
    return {**result, **judge(untrained.embed, loader, val, args, log, start, "untrained encoder")}


def judge(embed, loader, val, args, log, start: str, what: str) -> dict:
    """kNN, where there are validation images, and the signals that need no labels."""
    result, told = {}, []
    if val is not None:
        where = dict(size=args.img_size, device=loader.device, workers=args.workers)
        result["knn_top1"] = knn.accuracy(embed, loader.images, val, **where)
        told = [f"kNN top-1 {result['knn_top1']:.2f} %"]
    result |= label_free.signals(embed, loader)
    told += [
        f"effective rank {result['effective_rank']:.1f}",
        f"view agreement {result['view_agreement']:.3f}",
    ]
    log.say(f"{start}{'  '.join(told)} ({what})")
    return result


def default_workdir(args) -> str:
    """A new folder in runs/, named by what is run and when, or by SLURM's job, which may be started several times."""
    arch = args.arch.replace(
        ":", "-"
    )  # rsync and scp take what stands before a colon for a machine
    start = os.environ.get("SLURM_JOB_ID") or f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return os.path.join("runs", f"{args.method}-{arch}-{args.dataset}-{start}")


def notes(args, num_images: int) -> list[str]:
    """Settings that work, but that a user should know about."""
    told = []
    if args.method != "mocov3" and args.bank_size > num_images:
        told.append(
            f"the bank ({args.bank_size} rows) is larger than the data set ({num_images} images): it holds old copies"
        )
    if args.method != "snclr":
        told.append(
            f"method {args.method} does not use soft neighbours: --topk, --form and the weights' flags have no effect"
        )
    if not args.arch.startswith("resnet") and (args.width or args.small_stem):
        told.append(f"--width and --small-stem concern ResNets: no effect on {args.arch}")
    if args.arch not in ("vit_tiny", "vit_small", "vit_base") and args.stop_grad_conv1:
        told.append(
            f"--stop-grad-conv1 concerns ViTs with a plain patch embedding: no effect on {args.arch}"
        )
    return told


if __name__ == "__main__":
    with one_clear_line("main_snclr.py"):
        main(sys.argv[1:])
