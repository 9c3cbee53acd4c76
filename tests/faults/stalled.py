"""main_snclr.py; the worker of rank 1 reads the images of STEPS steps, 4 each, and then no more.

python stalled.py STEPS FLAGS
"""

import os
import sys
import time

import main_snclr
from snclr.datasets import images
from snclr.running import workers
from snclr.running.errors import one_clear_line

decode, rank, calls = images.decode, os.getpid(), []


def decode_some(*args):
    if os.environ["RANK"] == "1" and os.getpid() != rank:
        calls.append(1)
        while len(calls) > 4 * int(sys.argv[1]):
            time.sleep(1)
    return decode(*args)


images.decode = decode_some
workers.PATIENCE, workers.POLL = 1, 0.2
with one_clear_line("stalled.py"):
    main_snclr.main(sys.argv[2:])
