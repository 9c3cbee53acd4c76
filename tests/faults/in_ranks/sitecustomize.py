"""What a test lets a rank do at an exact moment. Python imports this file at its start where the
folder is in PYTHONPATH (attack.in_step).

RANKS_WAIT=FILE             ranks go on when the file exists
IN_STEP="RANK STEP NUMBER"  at the first start, this rank gets a signal before the end of this step;
                            then the others wait only 2 s for it, no longer --timeout-minutes
"""

import os
import signal
import time


def wait(path):
    while not os.path.exists(path):
        time.sleep(0.05)


def signal_in_step(rank, step, number):
    import datetime
    import warnings

    import torch.distributed as dist

    from snclr.running import preemption, process_group

    due, steps, groups = preemption.Interruptions.due, [], []
    start_group = preemption.LaggedMaximum

    def recorded(minutes):
        maximum = start_group(minutes)
        groups.extend([None, maximum.group])
        for group in groups:  # the flag's time limit is that of both
            backend = (group or dist.group.WORLD)._get_backend(dist.torch.device("cpu"))
            assert backend.options._timeout == datetime.timedelta(minutes=minutes)
        return maximum

    def signal_and_ask(self):
        steps.append(1)
        if len(steps) == step and os.environ["RANK"] == rank:
            os.kill(os.getpid(), number)
        elif len(steps) == step and number == signal.SIGSTOP:
            warnings.simplefilter("ignore")  # about the name of the next function
            for group in groups:
                dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2), group)
        return due(self)

    process_group.GRACE = 1  # there are only two ranks, of which one is lost
    preemption.Interruptions.due, preemption.LaggedMaximum = signal_and_ask, recorded


if "RANK" in os.environ:  # not the launcher
    if "RANKS_WAIT" in os.environ:
        wait(os.environ["RANKS_WAIT"])
    counts = [os.environ.get(f"{name}_RESTART_COUNT", "0") for name in ("SNCLR", "TORCHELASTIC")]
    if "IN_STEP" in os.environ and counts == ["0", "0"]:
        rank, step, number = os.environ["IN_STEP"].split()
        signal_in_step(rank, int(step), int(number))
