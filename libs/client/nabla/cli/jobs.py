"""nabla jobs"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import click

from nabla.cli.entering import exec_, open_port, shell
from nabla.cli.output import details, note, print_json, table
from nabla.cli.projects import LIMIT
from nabla.cli.queueing import amounts, clone, retry, timeline
from nabla.cli.queueing import explain as explain_command
from nabla.cli.session import Group, Session, pass_session
from nabla.errors import ApiError
from nabla.hints import LAST_LINES, readable_size
from nabla.objects import Attempt, Job, JobDetail, LogLine, Member

if TYPE_CHECKING:
    from nabla.client import Client

STATES = (
    "submitted", "waiting", "queued", "starting", "running", "unreachable", "succeeded", "failed", "cancelled",
    "timed_out",
)  # fmt: skip
# As the API has it.
MOST_LINES = 100_000


@click.group(cls=Group)
def jobs() -> None:
    """List, watch, explain, stop and repeat jobs."""


@jobs.command("list", example="nabla jobs list --project digits --state running")
@click.option("--project", default="", help="Only this project's.")
@click.option("--state", type=click.Choice(STATES), help="Only those in this state.")
@click.option("--all", "all_kinds", is_flag=True, help="Builds and replicas of deployments, too.")
@LIMIT
@pass_session
def list_jobs(session: Session, project: str, state: str | None, all_kinds: bool, limit: int) -> None:
    """List jobs, the newest first."""
    found = list(session.client().jobs.list(project, state or "", "any" if all_kinds else "", limit))
    if session.as_json:
        return print_json(found)
    rows = [(job.id, job.template.name, job.state, _result(job), job.detail, job.created_at) for job in found]
    table(
        ("ID", "NAME", "STATE", "EXIT", "DETAIL", "CREATED"),
        rows,
        "No jobs. `nabla run -- COMMAND` starts one.",
    )


@jobs.command(example="nabla jobs get js01jabc")
@click.argument("job")
@pass_session
def get(session: Session, job: str) -> None:
    """Show a job, its attempts and its history; for a failed one its last lines and a hint."""
    client = session.client()
    found = client.jobs.get(job)
    if session.as_json:
        return print_json(found)
    _show(found)
    if found.job.state in ("failed", "timed_out"):
        from nabla.cli.follow import explain

        explain(found.job, [line.text for line in client.jobs.tail(job, LAST_LINES)], repeat=True)


@jobs.command(example=("nabla jobs logs js01jabc --tail 50", "nabla jobs logs js01jabc --follow"))
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Until the job has ended.")
@click.option("--tail", type=click.IntRange(0, MOST_LINES), help="Start with the last N lines.")
@click.option("--rank", type=click.IntRange(0), help="Of a job of several processes, only this one's.")
@pass_session
def logs(session: Session, job: str, follow: bool, tail: int | None, rank: int | None) -> None:
    """Print a job's log. With --json one object a line. After --follow a failed job ends with its reason and a hint.

    The processes of one job are told apart by their rank; lines without one are rank 0's.
    """
    from nabla.cli.follow import conclude, in_sight, print_json_line, show_line

    show_any = print_json_line if session.as_json else show_line

    def show(line: LogLine) -> None:
        if rank is None or line.rank == rank:
            show_any(line)

    client = session.client()
    seen: deque[LogLine] = deque(maxlen=LAST_LINES)
    start = after = 0 if tail is None else _before_last(client, job, tail)
    for line in client.jobs.logs(job, start):
        show(line)
        seen.append(line)
        after = line.sequence
    if not follow:
        return
    ended = Job()
    for event in client.jobs.watch(job, after):
        if isinstance(event, LogLine):
            show(event)
            seen.append(event)
        else:
            ended = event
    visible = in_sight(seen, as_json=False) and not session.as_json
    conclude(client, ended, seen, from_start=start == 0, in_sight=visible)


@jobs.command(example="nabla jobs attach js01jabc")
@click.argument("job")
@click.option(
    "--tail",
    type=click.IntRange(0, MOST_LINES),
    default=100,
    show_default=True,
    help="Start with the last N lines.",
)
@pass_session
def attach(session: Session, job: str, tail: int) -> int:
    """Come back to a job: its log until it ends. The exit code is the job's; Ctrl-C leaves again."""
    from nabla.cli.follow import follow

    client = session.client()
    return follow(session, client, job, _before_last(client, job, tail))


@jobs.command(example="nabla jobs stop js01jabc")
@click.argument("job", nargs=-1, required=True)
@pass_session
def stop(session: Session, job: tuple[str, ...]) -> int:
    """Stop jobs. One that has ended stays as it is. Exit code 1 when one could not be stopped; the others are."""
    from nabla.cli.failures import render

    client, stopped = session.client(), []
    for job_id in job:
        try:
            one = client.jobs.stop(job_id)
        except ApiError as error:
            note(render(error))
            continue
        stopped.append(one)
        if not session.as_json:
            note(f"Job {one.id} is {one.state}." if one.ended else f"Stopping job {one.id}.")
    if session.as_json:
        print_json(stopped)
    return int(len(stopped) < len(job))


@jobs.command(example="nabla jobs environment js01jabc > exact.txt")
@click.argument("job")
@pass_session
def environment(session: Session, job: str) -> int:
    """Print what was installed for a job, with versions and hashes: `nabla run --requirements` takes it again."""
    text = session.client().jobs.environment(job)
    if session.as_json:
        print_json({"requirements": text})
        return 0
    if not text:
        note("Nothing was built for this job: it runs in an environment that was there before.")
        return 1
    click.echo(text, nl=False)
    return 0


@jobs.command(example="nabla jobs metrics js01jabc --name loss")
@click.argument("job")
@click.option("--name", default="", help="Only this metric.")
@click.option("--max-points", type=click.IntRange(1), help="Thin each series to so many points.")
@pass_session
def metrics(session: Session, job: str, name: str, max_points: int | None) -> None:
    """Show what a job has logged; --json has every point."""
    series = session.client().jobs.metrics(job, name, max_points)
    if session.as_json:
        return print_json(series)
    rows = [(one.name, one.last, one.min, one.max, one.point_count) for one in series]
    table(
        ("METRIC", "LAST", "MIN", "MAX", "POINTS"),
        rows,
        "No metrics. nabla.log({...}) in the job records them.",
    )


@jobs.command(example=("nabla jobs top js01jabc", "nabla jobs top js01jabc --json"))
@click.argument("job")
@pass_session
def top(session: Session, job: str) -> None:
    """Show what a running job uses: CPU, memory, disk, network, GPUs. --json has one object a line for each second."""
    from nabla.cli.top import show

    show(session.client(), job, session.as_json)


for made in (explain_command, timeline, retry, clone, exec_, shell, open_port):
    jobs.add_command(made)


def _before_last(client: Client, job: str, count: int) -> int:
    """The sequence number after which the last `count` lines come."""
    page = client.jobs.log_page(job, -max(count, 1), 1)
    if count:
        return page.lines[0].sequence - 1 if page.lines else 0
    return page.last_sequence


def _result(job: Job) -> object:
    return "" if job.exit_code is None else job.exit_code


def _member(member: Member) -> tuple[object, ...]:
    code = "" if member.exit_code is None else member.exit_code
    return member.rank, member.role, member.state, code, member.node_id[:12], member.detail or member.reason


def _show(found: JobDetail) -> None:
    job, template, attempt = found.job, found.job.template, found.job.attempt or Attempt()
    details(
        [
            ("id", job.id),
            ("name", template.name),
            ("state", job.state),
            ("detail", job.detail),
            ("exit code", _result(job)),
            ("command", " ".join(template.command)),
            ("project", job.project_id),
            ("experiment", job.experiment_id),
            ("node", attempt.node_id),
            ("isolation", attempt.isolation),
            ("asked for", amounts(template.resources)),
            ("machine type", template.machine_type),
            ("priority", "" if template.priority is None else template.priority),
            ("peak memory", readable_size(attempt.peak_memory_bytes) if attempt.peak_memory_bytes else ""),
            ("environment", template.environment.path or template.environment.kind),
            ("from", ", ".join(f"{key} {value}" for key, value in {**template.origin, **attempt.origin}.items())),
            ("created", job.created_at),
            ("started", job.started_at),
            ("ended", job.ended_at),
        ]
    )
    if attempt.members:
        click.echo()
        table(("RANK", "ROLE", "STATE", "EXIT", "NODE", "DETAIL"), list(map(_member, attempt.members)), "")
    rows = [(entry.at, entry.state, entry.attempt or "", entry.detail) for entry in found.timeline]
    click.echo()
    table(("WHEN", "STATE", "ATTEMPT", "DETAIL"), rows, "No history yet.")
