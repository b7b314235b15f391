"""Writes a report: one HTML page that needs no script and no network, Markdown, CSV tables, PNG and SVG figures."""

import base64
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from stablelm.new_files import make_folder, replace_file
from stablelm.observe.page.template import page_template
from stablelm.study.report.conclusions import banners, limits, verdicts
from stablelm.study.report.figures import figures
from stablelm.study.report.findings import Findings, diverged, words_of
from stablelm.study.report.tables import Table, as_csv, as_markdown, tables

DOTS = 130  # an inch


class Picture(NamedTuple):
    """`svg`: text of the picture; `png`: its bytes."""

    name: str
    title: str
    svg: str
    png: bytes


def write_report(found: Findings, folder: Path) -> Path:
    """Fills `folder` and returns the page's path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, made = list(_pictures(found)), list(tables(found))
    inside = make_folder(folder / "figures")
    for picture in pictures:
        replace_file(inside / f"{picture.name}.svg", picture.svg)
        replace_file(inside / f"{picture.name}.png", picture.png)
    inside = make_folder(folder / "tables")
    for table in made:
        replace_file(inside / f"{table.name}.csv", as_csv(table))
    replace_file(folder / "report.md", _markdown(found, pictures, made))
    page = folder / "report.html"
    replace_file(page, _page(found, pictures, made))
    return page


def _pictures(found: Findings) -> Iterator[Picture]:
    for name, title, figure in figures(found):
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=DOTS, metadata={"Software": None})
        yield Picture(name, title, svg.getvalue(), png.getvalue())


def _markdown(found: Findings, pictures: list[Picture], made: list[Table]) -> str:
    lines = [f"# {found.study.study}", "", *_reservations(found), "## What it says", ""]
    lines += [f"- {line}" for line in verdicts(found)] + ["", f"Limits: {_limits(found)}.", ""]
    for picture in pictures:
        lines += [f"## {picture.title}", "", f"![{picture.title}](figures/{picture.name}.png)", ""]
    for table in made:
        lines += [f"## {table.title}", "", *([table.note, ""] if table.note else []), as_markdown(table), ""]
    return "\n".join(lines)


def _reservations(found: Findings) -> list[str]:
    lines = banners(found)
    return ["Reservations:", "", *(f"- **{line}**" for line in lines), ""] if lines else []


def _limits(found: Findings) -> str:
    return "; ".join(f"**{words}**" if stressed else words for words, stressed in limits(found))


def _page(found: Findings, pictures: list[Picture], made: list[Table]) -> str:
    template, style, policy = page_template(Path(__file__).parent, "study.html")
    return template.render(
        found=found,
        banners=banners(found),
        verdicts=verdicts(found),
        limits=limits(found),
        pictures=[(each.title, each.name, base64.b64encode(each.png).decode()) for each in pictures],
        tables=made,
        diverged=[words_of(each) for each in diverged(found)],
        foreign=[words_of(each) for each in found.foreign],
        study=json.dumps(_plain(found), indent=1),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=style,
        policy=policy,
    )


def _plain(found: Findings) -> dict[str, Any]:
    """The study file's content, for the page."""
    study = found.study
    return {
        "study": study.study, "base": study.base, "grid": study.grid, "shapes": vars(study.shapes),
        "budget": vars(study.budget), "warmup_fraction": study.warmup_fraction, "lr": vars(study.lr),
        "seeds": vars(study.seeds), "stages": study.stages,
    }  # fmt: skip
