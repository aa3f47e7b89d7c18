"""Measures a checkpoint: its loss on any text, or its answers to multiple-choice questions.

  python scripts/evaluate.py --workdir=runs/tiny --text="docs/**/*.txt"
  python scripts/evaluate.py --workdir=runs/tiny --choices=questions.jsonl --json=-

Questions are lines of {"question": text, "choices": [texts], "answer": index from 0}, or of the
form in which ARC is published: "choices": {"text": [texts], "label": [names]}, "answerKey": name.
"""

import rich
from absl import app, flags

from dsmoe import checkpoint, runtime
from dsmoe.evaluation import multiple_choice, perplexity
from dsmoe.reporting import output, progress

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's, on disk or gs://.", required=True)
_TEXT = flags.DEFINE_string("text", None, "A glob of text, .jsonl or .parquet files, or stdlib.")
_CHOICES = flags.DEFINE_string("choices", None, "A .jsonl file of questions.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint; by default the newest.")
_JSON = output.define_json()


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  runtime.start()
  for option in (_WORKDIR, _TEXT, _CHOICES):
    if option.value is not None and not option.value.strip():
      raise app.UsageError(f"--{option.name} must not be empty")
  questions = multiple_choice.read_questions(_CHOICES.value) if _CHOICES.value else []
  run = checkpoint.load_run(_WORKDIR.value, _STEP.value)
  if _TEXT.value:
    result = perplexity.score_text(run, _TEXT.value)
  else:
    result = multiple_choice.score_choices(run, questions)
  output.write_json(_JSON.value, {"step": run.step, **result})
  if _JSON.value != output.STDOUT:
    rows = [(name.replace("_", " "), f"{value:,.6g}") for name, value in result.items()]
    rich.print(progress.final_table(rows, title=f"{_WORKDIR.value}, step {run.step}"))


if __name__ == "__main__":
  flags.mark_flags_as_mutual_exclusive(["text", "choices"], required=True)
  output.run_script(main)
