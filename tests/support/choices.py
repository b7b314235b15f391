"""Multiple-choice items in the words of the tiny corpus."""

import json
import random
from pathlib import Path

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
"""A definition of lm-evaluation-harness over a file of such items."""


def write_items(path: Path, count: int = 30, seed: int = 0) -> Path:
    """Items in the corpus's words, some longer than the model's 32 tokens, some with choices that are equal."""
    draw = random.Random(seed)
    words = ["ban", "der", "fi", "gosta", "huto", "ka", "lelim", "mir"]

    def text(most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, most)))

    items = [
        {
            "query": text(12) + draw.choice(["", "\n", " "]),
            "choices": [text(4) for _ in range(4)],
            "gold": draw.randrange(4),
        }
        for _ in range(count)
    ]
    items[0] |= {"query": text(60)}
    items[1] |= {"choices": [text(2), " ".join(words * 20)]}
    items[1]["gold"] = 1
    items[2] |= {"query": "", "choices": ["ban", "ban", "ban der"], "gold": 1}
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path
