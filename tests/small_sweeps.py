"""Sweeps whose runs take seconds, and the settings of one, as a command line gives them."""

import transformers
from small_runs import TASK

from lab.sweep import Sweep

SUM_TASK = ["--env", "SAPO/TextSum-v0", "--env_args", "n=1", "largest=99"]
# The small runs' task and warm start, which the fixture `runs` has made, on small batches.
LEARNED = [
    *TASK[TASK.index("--max_new_tokens") :],
    *("--batch", "16", "--minibatch", "8", "--eval_episodes", "32", "--group", "4"),
    *("--branching", "2", "2"),
]


def parsed_sweep(*flags):
    """(the sweep, the flags that are train.py's); unlike the command line's it gives no tag."""
    parser = transformers.HfArgumentParser(Sweep)
    return parser.parse_args_into_dataclasses(list(flags), return_remaining_strings=True)
