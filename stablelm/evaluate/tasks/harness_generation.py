"""Texts for lm-evaluation-harness: prompts shared out over the ranks, each with the whole model."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.evaluate.generation.generate import Language, continue_prompts
from stablelm.evaluate.generation.loaded_model import load
from stablelm.evaluate.generation.prompts import Prompt
from stablelm.evaluate.generation.sampling import Sampling
from stablelm.evaluate.tasks.likelihood import evaluating
from stablelm.evaluate.trained_run import TrainedRun


def generated(
    run: TrainedRun,
    engine: Engine,
    ranks: Ranks,
    prompts: Sequence[list[int]],
    *,
    rows: int,
    new: int,
    stop: Sequence[str],
    **sampling: Any,
) -> list[str]:
    """What the model writes after each prompt, on every rank; up to `new` tokens, `rows` prompts at a time. Collective.

    A text depends on its prompt, and on how many equal ones came before it, not on the world size. One process uses its
    engine; of several each loads the whole model, because generation asks a sharded one for every token by itself.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    asked = []
    for tokens in prompts:
        asked.append(Prompt(tokens, seen[tuple(tokens)]))
        seen[tuple(tokens)] += 1
    own = range(ranks.rank, len(asked), ranks.world_size)
    options: dict[str, Any] = {"temperature": 0.0} | sampling
    how = Sampling(max_new_tokens=new, stop=tuple(stop), **options)
    with evaluating(engine.module):
        language = _language(run, engine, ranks)
        found = continue_prompts(language, [asked[index] for index in own], how, batch_size=rows)
    texts = {
        index: text
        for part in ranks.gather([(i, one.text) for i, one in zip(own, found, strict=True)])
        for index, text in part
    }
    return [texts[index] for index in range(len(asked))]


def _language(run: TrainedRun, engine: Engine, ranks: Ranks) -> Language:
    if ranks.world_size == 1:
        return Language(engine.logits, run.config.model, run.tokenizer, engine.device)
    return load(run, str(engine.device)).language
