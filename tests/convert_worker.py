"""A process that has everything imported and converts in forks of itself, so that tests can kill many of them quickly.

Reads one JSON object a line (source, out, groups, force); answers with the fork's process id, then its exit status.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import transformers

from gqa_convert.conversion import execute


def main() -> None:
    torch.set_num_threads(1)
    transformers.LlamaForCausalLM  # noqa: B018  (imports the modelling code, once for all forks)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                execute.convert(**wanted)
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
