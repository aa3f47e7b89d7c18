"""Measures a checkpoint: its loss on any text, or its answers to multiple-choice questions.

python scripts/evaluate.py --workdir=runs/tiny --text="docs/**/*.txt"
python scripts/evaluate.py --workdir=runs/tiny --choices=questions.jsonl

Questions are lines of {"question": text, "choices": [texts], "answer": index from 0}.
"""

import json
import sys

import rich
from absl import app, flags, logging

from dsmoe import checkpoint, runtime
from dsmoe.evaluation import multiple_choice, perplexity
from dsmoe.reporting import progress

_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run, on disk or gs://.", required=True)
_TEXT = flags.DEFINE_string("text", None, "A glob of text, .jsonl or .parquet files; or stdlib.")
_CHOICES = flags.DEFINE_string("choices", None, "A .jsonl file of questions.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.")
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON instead of a table.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  runtime.start()
  try:
    questions = multiple_choice.read_questions(_CHOICES.value) if _CHOICES.value else []
    run = checkpoint.load_run(_WORKDIR.value, _STEP.value)
    if _TEXT.value:
      result = perplexity.score_text(run, _TEXT.value)
    else:
      result = multiple_choice.score_choices(run, questions)
  except ValueError as error:
    sys.exit(f"evaluate: {error}")
  if _JSON.value:
    print(json.dumps({"step": run.step, **result}))
    return
  rows = [(name.replace("_", " "), f"{value:,.6g}") for name, value in result.items()]
  rich.print(progress.final_table(rows, title=f"{_WORKDIR.value}, step {run.step}"))


if __name__ == "__main__":
  flags.mark_flags_as_mutual_exclusive(["text", "choices"], required=True)
  app.run(main)
