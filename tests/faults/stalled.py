"""main_snclr.py; while a file exists, the workers of rank 1 can read no image.

python stalled.py FILE FLAGS
"""

import os
import sys
import time

import main_snclr
from snclr.datasets import images
from snclr.running import workers
from snclr.running.errors import one_clear_line

decode, block = images.decode, sys.argv[1]


def when_free(*args):
    while os.environ["RANK"] == "1" and os.path.exists(block):
        time.sleep(0.1)
    return decode(*args)


images.decode = when_free
workers.PATIENCE, workers.POLL = 1, 0.2
with one_clear_line("stalled.py"):
    main_snclr.main(sys.argv[2:])
