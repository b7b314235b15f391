"""Advice in words."""

from collections.abc import Sequence

from stablelm.study.advise import LITERATURE, NEAR, NONE, Advice, Question, study_text
from stablelm.study.literature import published
from stablelm.study.records import StudyRecord


def words(question: Question, advice: Advice | None, records: Sequence[StudyRecord]) -> str:
    """Some lines of text; without evidence what there is instead, and the study file that would tell."""
    size = f"{question.n_layers}x{question.d_model}, {question.tokens:,} tokens"
    if advice is None:
        own = [each for each in records if each["method"] == question.method]
        known = ", ".join(sorted({f"{each['n_layers']}x{each['d_model']}" for each in own})) or "none at all"
        paper = published(question)
        said = [f"{question.method} at {size}: {LITERATURE if paper else NONE}"]
        if paper is not None:
            depths = " and ".join(map(str, paper.depths))
            worse = "; {:g} diverged at {} layers".format(*paper.diverged) if paper.diverged else ""
            said += [
                f"learning rate  {paper.rate:g} trained {depths} layers{worse}",
                f"from           {paper.source}",
                "               not measured with this program, nor on your text",
            ]
        return (
            "\n".join(said) + "\n"
            f"No recorded study of it lies within a factor of {NEAR:g} in depth, width and tokens (it has {known}).\n"
            f"These six to nine runs would tell (--study FILE writes them):\n\n{study_text(question)}"
        )
    lines = [
        f"{question.method} at {size}: {advice.grade}",
        f"learning rate  {advice.rate:.3g} ({advice.low:.2g} to {advice.high:.2g})",
        f"warm-up        {advice.warmup_fraction:.0%} of the steps",
    ]
    if advice.loss is not None:
        half = f" ± {advice.half:.3f}" if advice.half is not None else ""
        lines.append(f"loss           {advice.loss:.3f}{half} nats per token, on the study's text")
    lines += [f"from           {_quoted(each)}" for each in advice.quoted]
    if advice.second is not None:
        verdict, record = advice.second
        lines.append(f"second choice  {record['method']} at {record['rate']:.3g}, {verdict}")
    lines += [f"{'would change it' if not place else '':<15}{line}" for place, line in enumerate(advice.caution)]
    return "\n".join(lines) + "\n"


def _quoted(record: StudyRecord) -> str:
    return (
        f"study {record['study']}: {record['n_layers']}x{record['d_model']}, {record['tokens']:,} tokens, "
        f"{len(record['seeds'])} seeds at {record['rate']:.3g}: {record['loss']:.3f} (runs {', '.join(record['runs'])})"
    )
