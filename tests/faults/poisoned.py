"""main_snclr.py with a nan loss on rank 1 in steps FIRST to LAST.

python poisoned.py FIRST LAST FLAGS
"""

import math
import os
import sys

import main_snclr
from snclr import streamed
from snclr.running.errors import one_clear_line
from snclr.running.guard import Guard

calls, original = [], streamed._LogSumExp.forward


def poisoned(ctx, *arguments):
    calls.append(1)  # two a step
    is_poisoned = os.environ["RANK"] == "1" and int(sys.argv[1]) <= (len(calls) + 1) // 2 <= int(
        sys.argv[2]
    )
    return original(ctx, *arguments) * (math.nan if is_poisoned else 1)


streamed._LogSumExp.forward = poisoned
Guard.try_forward = lambda *_: True  # it computes the loss once more, before a save
with one_clear_line("poisoned.py"):
    main_snclr.main(sys.argv[3:])
