"""Writes a report: one HTML page that needs no script and no network, Markdown, CSV tables, PNG and SVG figures."""

import base64
import io
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from stablelm.new_files import make_folder, replace_file
from stablelm.observe.page.template import page_template
from stablelm.study.report.conclusions import banners, limits, verdicts
from stablelm.study.report.figures import figures
from stablelm.study.report.findings import Findings, diverged, words_of
from stablelm.study.report.tables import Table, as_csv, as_markdown, tables
from stablelm.study.study_file import Study

DOTS = 130  # an inch


class Picture(NamedTuple):
    """`svg`: text of the picture; `png`: its bytes."""

    name: str
    title: str
    svg: str
    png: bytes


class ReportContents(NamedTuple):
    """What a report holds. `figures`: name, title and figure of each; `limits`: words, and whether to stress them;
    `lists`: title, note and lines."""

    study: Study
    subtitle: str
    banners: list[str]
    verdicts: list[str]
    limits: list[tuple[str, bool]]
    figures: Iterable[tuple[str, str, Figure]]
    tables: list[Table]
    lists: list[tuple[str, str, list[str]]]


def contents_of(found: Findings) -> ReportContents:
    """Of a study of training runs."""
    depths = ", ".join(map(str, found.depths))
    foreign = "Left from another grid; they are in no table."
    return ReportContents(
        found.study,
        f"{len(found.runs)} runs, {len(found.arms)} arms, depths {depths}",
        banners(found),
        verdicts(found),
        limits(found),
        figures(found),
        list(tables(found)),
        [
            ("Diverged", "", [words_of(each) for each in diverged(found)]),
            ("Results of no cell of this study", foreign, [words_of(each) for each in found.foreign]),
        ],
    )


def write_report(made: ReportContents, folder: Path) -> Path:
    """Fills `folder` and returns the page's path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_picture(*each) for each in made.figures]
    inside = make_folder(folder / "figures")
    for picture in pictures:
        replace_file(inside / f"{picture.name}.svg", picture.svg)
        replace_file(inside / f"{picture.name}.png", picture.png)
    inside = make_folder(folder / "tables")
    for table in made.tables:
        replace_file(inside / f"{table.name}.csv", as_csv(table))
    replace_file(folder / "report.md", _markdown(made, pictures))
    page = folder / "report.html"
    replace_file(page, _page(made, pictures))
    return page


def _picture(name: str, title: str, figure: Figure) -> Picture:
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=DOTS, metadata={"Software": None})
    return Picture(name, title, svg.getvalue(), png.getvalue())


def _markdown(made: ReportContents, pictures: list[Picture]) -> str:
    lines = [f"# {made.study.study}", ""]
    if made.banners:
        lines += ["Reservations:", "", *(f"- **{line}**" for line in made.banners), ""]
    lines += ["## What it says", "", *(f"- {line}" for line in made.verdicts), ""]
    if made.limits:
        lines += [f"Limits: {'; '.join(f'**{words}**' if bold else words for words, bold in made.limits)}.", ""]
    for picture in pictures:
        lines += [f"## {picture.title}", "", f"![{picture.title}](figures/{picture.name}.png)", ""]
    for table in made.tables:
        lines += [f"## {table.title}", "", *([table.note, ""] if table.note else []), as_markdown(table), ""]
    return "\n".join(lines)


def _page(made: ReportContents, pictures: list[Picture]) -> str:
    template, style, policy = page_template(Path(__file__).parent, "study.html")
    return template.render(
        **made._asdict(),
        pictures=[(each.title, each.name, base64.b64encode(each.png).decode()) for each in pictures],
        file=json.dumps(_plain(made.study), indent=1),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=style,
        policy=policy,
    )


def _plain(study: Study) -> dict[str, Any]:
    """The study file's content, for the page."""
    return {
        "study": study.study, "kind": study.kind, "base": study.base, "grid": study.grid, "shapes": vars(study.shapes),
        "budget": vars(study.budget), "warmup_fraction": study.warmup_fraction, "lr": vars(study.lr),
        "seeds": vars(study.seeds), "stages": study.stages,
    }  # fmt: skip
