"""The parts of a report on adaptation: few-shot curves, and what users kept of a sequence of tasks."""

from __future__ import annotations

from simulations import continual_tables, curves, page, svg, tables
from simulations.continual_tables import Continual
from simulations.curves import FewShots
from simulations.tables import Record


def few_shots(record: Record) -> str:
    """Nothing where no curve was measured."""
    found = curves.curves_of_record(record)
    if found is None:
        return ""
    return page.section(
        "How few steps a new user needs",
        page.paragraph(
            "Each line is a way to adapt to a new user: how good it is after so many steps on the examples that the "
            "user owns. Higher is better, and further left is sooner. At 0 steps is what a user gets before any step."
        ),
        page.drawing(svg.few_shot_curves(found), shots_caption(found)),
        page.bullets(curves.verdicts(found)),
    )


def shots_caption(found: FewShots) -> str:
    """What lines and bands are."""
    parts = [f"Mean {found.unit} over new users; steps are spaced as logarithms."]
    parts += [f"Shaded: {found.band}."] if found.band else []
    parts += ["Dotted: the frozen model."] if found.frozen == found.frozen else []
    return " ".join(parts)


def tasks_caption(found: Continual) -> str:
    """How to read matrices."""
    return (
        f"Figures: {continual_tables.unit(found)}; brighter is better. Read a row: how good users are on each task "
        "once they have learned so many. Read a column downwards: what becomes of one task. Its figure rises where the "
        "task is learned; where it falls below that, users forget."
    )


def continual(record: Record) -> str:
    """Nothing where no sequence was measured."""
    found = record.get("continual")
    if not found or not found["rules"]:
        return ""
    return page.section(
        "What users keep when tasks come one after the other",
        page.paragraph(
            f"{found['users']} new users met {found['tasks']} tasks in turn and adapted to each without the data of "
            "the earlier ones. A rule says what they do so as not to forget."
        ),
        page.paragraph(continual_tables.example(found)),
        page.drawing(svg.task_matrices(found), tasks_caption(found)),
        page.paragraph("The same in one figure for each question:"),
        page.facts(dict(continual_tables.words_of_metrics())),
        tables.html(continual_tables.rules_table(found)),
    )
