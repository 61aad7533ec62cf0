"""What lm-eval says of a task of choices: run by a Python that has it, as `lm_eval_choices.py MODEL TASK_FOLDER TASK`.

Prints a line `ANSWER` with the log-likelihood of every choice, item by item, and lm-eval's own results.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

if __name__ == "__main__":
    folder, tasks, name = sys.argv[1:]
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=4)
    done = lm_eval.simple_evaluate(model=model, tasks=[name], task_manager=TaskManager(include_path=tasks))
    samples = sorted(done["samples"][name], key=lambda each: each["doc_id"])
    values = [[float(response[0][0]) for response in each["resps"]] for each in samples]
    answer = {"likelihoods": values, "results": done["results"][name], "version": version("lm-eval")}
    print("ANSWER", json.dumps(answer, default=str))
