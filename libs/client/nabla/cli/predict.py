"""nabla predict"""

from __future__ import annotations

import json
from typing import TextIO

import click

from nabla.cli.output import cell, print_json
from nabla.cli.session import Command, Session, pass_session


@click.command(
    cls=Command,
    example=("nabla predict digits --json-data '[[0, 0, 5, 13]]'", "nabla predict digits --file rows.json"),
)
@click.argument("deployment")
@click.option("--json-data", metavar="JSON", help='Rows, or {"inputs": rows}.')
@click.option("--file", "file", type=click.File(encoding="utf-8"), help="The same from a file; - is standard input.")
@pass_session
def predict(session: Session, deployment: str, json_data: str | None, file: TextIO | None) -> None:
    """Send rows to a deployed model and print its predictions, one a line."""
    if (json_data is None) == (file is None):
        raise click.UsageError("Give the rows with --json-data or with --file.")
    answer = session.client().predict(deployment, _rows(json_data, file))
    predictions = answer.get("predictions")
    if session.as_json or not isinstance(predictions, list):
        return print_json(answer)
    for prediction in predictions:
        click.echo(cell(prediction))


def _rows(text: str | None, file: TextIO | None) -> object:
    try:
        rows: object = json.loads(file.read() if file else text or "")
    except ValueError as error:
        raise click.UsageError(f"The rows are not JSON: {error}") from error
    if not isinstance(rows, (list, dict)):
        raise click.UsageError('The rows must be a JSON list of lists, or {"inputs": [...]}.')
    return rows
